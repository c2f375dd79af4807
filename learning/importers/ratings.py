"""Ratings: convert any notation of a rating to a number in [-1, 1].

Words and thumbs mean the same everywhere. A bare number needs a scale, which is inferred from all ratings of one file: 1 is
the best value of 0 and 1, but the worst of five stars.
"""

import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bot.types import FeedbackKind
from learning.importers.recording import Recording

KEYS = ("rating", "label", "kto_tag", "feedback", "thumbs", "thumb", "vote", "stars", "score")  # the first one counts
GOOD = {
    *("true", "yes", "up", "good", "like", "liked", "thumbsup", "thumbup"),
    *("upvote", "upvoted", "positive", "desirable", "👍"),
}
BAD = {
    *("false", "no", "down", "bad", "dislike", "disliked", "thumbsdown", "thumbdown"),
    *("downvote", "downvoted", "negative", "undesirable", "👎"),
}
NUMBER = re.compile(r"([-+]?\d+(?:[.,]\d+)?)\s*(%|/\s*(\d{1,4})|stars?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Scale:
    """A rating scale from `low` (worst) to `high` (best). The middle is no opinion."""

    low: float
    high: float
    name: str

    def holds(self, values: Iterable[float]) -> bool:
        """Whether all values are on the scale."""
        return all(self.low <= value <= self.high for value in values)

    def to_opinion(self, value: float) -> float:
        """Return a value mapped from the worst (-1) to the best (1)."""
        return 2 * (value - self.low) / (self.high - self.low) - 1

    def __str__(self) -> str:
        if self == WORDS:
            return self.name
        middle = (self.low + self.high) / 2
        return f"{self.name} (below {middle:g} is a dislike, above it a like)"


WORDS = Scale(0, 1, "yes or no, in words")
BINARY = Scale(0, 1, "0 or 1")
STARS = Scale(1, 5, "1 to 5 stars")
PERCENT = Scale(0, 100, "0 to 100 percent")
SCALES = (  # a file has the first one that holds all its numbers
    Scale(0, 1, "0 to 1"),
    Scale(-1, 1, "-1 to 1"),
    STARS,
    Scale(0, 5, "0 to 5"),
    Scale(1, 10, "1 to 10"),
    Scale(0, 10, "0 to 10"),
    PERCENT,
    Scale(-5, 5, "-5 to 5"),
    Scale(-10, 10, "-10 to 10"),
    Scale(-100, 100, "-100 to 100"),
)


@dataclass(frozen=True)
class Rating:
    """A rating's number, and the scale that it was written with, if any."""

    value: float
    scale: Scale | None = None


def find_rating(row: dict[str, Any]) -> Any:
    """Return the rating of a row or a message as it is written, or None if there is none."""
    found = next((row[key] for key in KEYS if row.get(key) is not None), None)
    return find_rating(found) if isinstance(found, dict) else found


def parse_rating(raw: Any) -> Rating | None:
    """Return a rating as a number, or None if it is not a rating."""
    if isinstance(raw, bool):
        return Rating(float(raw), WORDS)
    if isinstance(raw, int | float):
        return Rating(float(raw)) if -100 <= raw <= 100 else None  # False for NaN
    if not isinstance(raw, str):
        return None
    text = raw.strip(": \t\n").casefold()
    word = re.sub(r"[\s_:-]|[\ufe0f\U0001f3fb-\U0001f3ff]", "", text)
    if word in GOOD or word in BAD:
        return Rating(float(word in GOOD), WORDS)
    if text and not text.strip("★☆⭐\ufe0f "):
        return Rating(text.count("★") + text.count("⭐"), STARS)
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    value, unit, best = float(found[1].replace(",", ".")), found[2], found[3]
    scale = None
    if unit == "%":
        scale = PERCENT
    elif best and best.strip("0"):
        scale = Scale(0, float(best), f"0 to {best}") if best != "5" or value < 1 else STARS
    elif unit:
        scale = STARS
    return Rating(value, scale) if (scale or SCALES[-1]).holds([value]) else None


def find_scale(values: Iterable[float]) -> Scale:
    """Return the narrowest scale that holds all of some numbers in [-100, 100]."""
    found = list(values)
    if all(value in (0, 1) for value in found):
        return BINARY
    return next(scale for scale in SCALES if scale.holds(found))


def convert_ratings(recording: Recording) -> None:
    """Convert the ratings of a recording to feedback. All bare numbers of a file are on one scale."""
    for file, kept in recording.ratings.items():
        parsed = [parse_rating(one.raw) for one in kept]
        bare = find_scale(rating.value for rating in parsed if rating is not None and rating.scale is None)
        scales = [rating.scale or bare for rating in parsed if rating is not None]
        recording.scales[file] = "; ".join(dict.fromkeys(map(str, scales)))
        for one, rating in zip(kept, parsed, strict=True):
            if rating is None:
                recording.leave_out("rating that is not understood", one.place, reprlib.repr(one.raw))
                continue
            opinion = (rating.scale or bare).to_opinion(rating.value)
            if opinion:
                kind = FeedbackKind.APPROVAL if opinion > 0 else FeedbackKind.DISAPPROVAL
                one.draft.add_feedback(one.turn, "rater", kind, "rating", value=opinion)
            else:
                recording.leave_out("neutral rating, in the middle of its scale", one.place, reprlib.repr(one.raw))
