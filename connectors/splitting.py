"""Split a long answer into messages that fit a platform's limit, each with whole Markdown.

A cut is made at the end of a paragraph, else of a line, a sentence, a word, else anywhere. A code fence that is open at a
cut is closed there and opened again, with its language, in the next part.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

Units = Callable[[str], int]

FENCE = re.compile(r"^ {0,3}(`{3,16}|~{3,16})([^`\n]{0,40})$")
LONGEST_MARKER = 16
CUTS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?…。！？]['\")\]]*(?:\s+|$)"), re.compile(r"\s+"))
JOINERS = "\u200d\ufe0e\ufe0f"


def count_utf16_units(text: str) -> int:
    """Return the length of `text` in UTF-16 code units, which is never less than in code points."""
    return len(text) + sum(character > "\uffff" for character in text)


@dataclass(frozen=True)
class Part:
    """One message: a piece of the answer (`body`), and the fences opened before it and closed after it."""

    opening: str
    body: str
    closing: str

    @property
    def text(self) -> str:
        """The text to send."""
        return self.opening + self.body + self.closing


def split(text: str, limit: int, units: Units = count_utf16_units) -> list[Part]:
    """Split `text` into parts of at most `limit` units. Their bodies join to `text`. Raises ValueError if `limit` < 200."""
    if limit < 200:
        raise ValueError(f"limit is {limit}, too few units for a part with a code fence; use 200 or more")
    parts: list[Part] = []
    start, fence = 0, ""
    while start < len(text) or not parts:
        opening = fence + "\n" if fence else ""
        room = limit - units(opening)
        rest = text[start : start + limit]
        whole = start + len(rest) == len(text) and units(rest) <= room
        body = rest if whole else ""
        fence = find_open_fence(opening + body) if whole else ""
        if not whole or units(body) + units(_make_closing_fence(body, fence)) > room:
            body = rest[: _find_cut(rest, room - LONGEST_MARKER - 1, units)]
            fence = find_open_fence(opening + body)
        parts.append(Part(opening, body, _make_closing_fence(body, fence)))
        start += len(body)
    return parts


def find_open_fence(text: str) -> str:
    """Return the line that opened the code fence which `text` leaves open, or "" if none is open."""
    opened, marker = "", ""
    for line in text.split("\n"):
        match = FENCE.match(line.rstrip("\r"))
        if match is None:
            continue
        if not opened:
            opened, marker = match[0].strip(), match[1]
        elif match[1].startswith(marker) and not match[2].strip():
            opened, marker = "", ""
    return opened


def _make_closing_fence(body: str, fence: str) -> str:
    if not fence:
        return ""
    marker = fence[: len(fence) - len(fence.lstrip(fence[0]))]
    return marker if body.endswith("\n") or not body else "\n" + marker


def _find_cut(text: str, room: int, units: Units) -> int:
    """Return where to cut `text` (in code points): the best place in the second half of what fits into `room` units."""
    end = _find_fitting_length(text, room, units)
    for pattern in CUTS:
        places = [match.end() for match in pattern.finditer(text, 0, end) if match.end() > end // 2]
        if places:
            return places[-1]
    best = end
    while best > end // 2 and _is_inside_character(text, best):
        best -= 1
    return best if best > end // 2 else end


def _find_fitting_length(text: str, room: int, units: Units) -> int:
    """Return the length (in code points, at least 1) of the longest beginning of `text` that fits into `room` units."""
    low, high = 1, min(len(text), room)
    while low < high:
        middle = (low + high + 1) // 2
        if units(text[:middle]) <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _is_inside_character(text: str, place: int) -> bool:
    """Return whether a cut at `place` would split what people see as one character."""
    if place >= len(text):
        return False
    after = text[place]
    tone = "\U0001f3fb" <= after <= "\U0001f3ff"
    return tone or after in JOINERS or text[place - 1] == JOINERS[0] or bool(unicodedata.combining(after))
