"""Wording: put numbers and nouns together in messages for people."""


def count_noun(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 version", "2,000 versions". `plural` is for nouns to which no s is added."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
