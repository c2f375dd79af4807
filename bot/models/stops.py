"""Stops: texts that an answer ends before, as a client asks for them. They hold for what is shown, not for thoughts."""

from collections.abc import Sequence

from bot.models.thoughts import count_overlap


class StopFilter:
    """Take an answer in pieces, and give back what stands before the first stop. How it was cut makes no difference."""

    def __init__(self, stops: Sequence[str]):
        self.is_hit = False
        self._stops = stops
        self._pending = ""  # what may yet become a stop

    def add(self, piece: str) -> str:
        """Take the next piece; return what may be shown now."""
        if self.is_hit:
            return ""
        text = self._pending + piece
        hits = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        self.is_hit = bool(hits)
        if hits:
            _, end = min(hits)  # the one that was whole first
        else:
            end = len(text) - max((count_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = "" if self.is_hit else text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return what was kept and was no stop after all."""
        rest, self._pending = self._pending, ""
        return rest
