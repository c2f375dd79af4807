"""Stops: texts, given by a client, before which an answer ends. They apply to the shown text, not to thoughts."""

from collections.abc import Sequence

from bot.models.thoughts import count_overlap


class StopFilter:
    """A filter for an answer in pieces: it lets through the text before the first stop, wherever the pieces are cut."""

    def __init__(self, stops: Sequence[str]):
        self.is_hit = False
        self._stops = stops
        self._pending = ""  # may be the beginning of a stop

    def add(self, piece: str) -> str:
        """Add the next piece, and return the text to show now."""
        if self.is_hit:
            return ""
        text = self._pending + piece
        hits = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        self.is_hit = bool(hits)
        if hits:
            _, end = min(hits)  # the stop that was complete first
        else:
            end = len(text) - max((count_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = "" if self.is_hit else text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return the pending text, which did not become a stop."""
        rest, self._pending = self._pending, ""
        return rest
