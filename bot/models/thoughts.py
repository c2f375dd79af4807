"""Thoughts: separates the thoughts of a policy from its answer.

A reasoning model writes its thoughts between two marks, such as <think> and </think>; some templates write the first mark
themselves. Thoughts are recorded as sampled, but never shown, remembered or split. A mark that an answer quotes as code is a
part of the answer.
"""

from dataclasses import dataclass

# The marks in use, as single tokens of a tokenizer or as plain text.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>", "<channel|>"),
    ("◁think▷", "◁/think▷"),
)
CHANNEL_MARK = "<|channel|>"  # begins both a thought and an answer, so that no pair of marks separates them


@dataclass(frozen=True)
class Thoughts:
    """How a policy marks its thoughts.

    `is_opened_by_prompt`: the prompt ends inside a thought. `is_special`: the marks are special tokens, which servers leave
    out of text unless asked. `is_only_at_start`: thoughts come only at the beginning; later marks belong to the answer.
    """

    opening: str
    closing: str
    is_opened_by_prompt: bool = False
    is_special: bool = False
    is_only_at_start: bool = False

    def remove_from(self, text: str) -> str:
        """Return an answer without its thoughts."""
        said = ThoughtFilter(self)
        return said.add(text) + said.flush()


# For a model whose vocabulary and template have no marks: it may have learned to think all the same.
UNMARKED = Thoughts(*MARKS[0], is_only_at_start=True)


class ThoughtFilter:
    """A filter for an answer in pieces: it lets through the text to show, wherever the pieces are cut."""

    def __init__(self, thoughts: Thoughts | None):
        """If `thoughts` is None, all text is shown."""
        self._thoughts = thoughts
        self._is_inside = self._was_inside = thoughts is not None and thoughts.is_opened_by_prompt
        self._has_begun = False
        self._backticks = 0  # in the shown text: after an odd number of them, the text is code
        self._space = ""  # white space before the first word; dropped if a thought follows
        self._pending = ""  # may be the beginning of a mark

    def add(self, piece: str) -> str:
        """Add the next piece, and return the text to show now."""
        if self._thoughts is None:
            return piece
        self._pending += piece
        shown = ""
        while (found := self._find_mark(self._thoughts)) is not None:
            start, mark = found
            end = start + len(mark)
            if self._is_part_of_answer(self._thoughts, self._pending[:start]):
                shown += self._trim_start(self._pending[:end])
                self._pending = self._pending[end:]
                continue
            shown += "" if self._is_inside else self._trim_start(self._pending[:start])
            self._pending = self._pending[end:]
            self._is_inside, self._was_inside, self._space = mark == self._thoughts.opening, True, ""
        keep = max(count_overlap(self._pending, mark) for mark in self._marks(self._thoughts))
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        return shown if self._is_inside else shown + self._trim_start(ready)

    def flush(self) -> str:
        """Return the pending text, which did not become a mark."""
        if self._is_inside:
            return ""
        rest = self._trim_start(self._pending)
        return rest if self._has_begun or self._was_inside else self._space

    def _marks(self, thoughts: Thoughts) -> tuple[str, ...]:
        return (thoughts.closing,) if self._is_inside else (thoughts.opening, thoughts.closing)

    def _find_mark(self, thoughts: Thoughts) -> tuple[int, str] | None:
        """Return the position of the next mark in the pending text, and the mark; None without one."""
        found = [(self._pending.find(mark), mark) for mark in self._marks(thoughts)]
        return min((one for one in found if one[0] >= 0), default=None)

    def _is_part_of_answer(self, thoughts: Thoughts, before: str) -> bool:
        """Tell whether a mark is a part of the answer; `before` is the pending text before it."""
        has_begun = self._has_begun or bool(before.strip())
        is_code = (self._backticks + before.count("`")) % 2 == 1
        return not self._is_inside and has_begun and (thoughts.is_only_at_start or is_code)

    def _trim_start(self, text: str) -> str:
        """Return the text without the white space between a thought and the first word."""
        self._backticks += text.count("`")
        if self._has_begun:
            return text
        text = self._space + text
        if not text.strip():
            self._space = text
            return ""
        self._has_begun, self._space = True, ""
        return text.lstrip() if self._was_inside else text


def count_overlap(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)
