"""Speakers: who says what, where more than one person talks.

It knows no platform and no tokens: connectors name the authors of what they hear, the tracker shows the names.
"""

from collections.abc import Sequence
from dataclasses import replace

from bot.types import Message, Role

LONGEST_NAME = 64  # characters


def clean_name(name: str) -> str:
    """Return a person's name in one line, with nothing that ends a name, at most LONGEST_NAME characters long."""
    return " ".join(name.replace(":", " ").split())[:LONGEST_NAME]


def with_speakers(said: Sequence[Message]) -> list[Message]:
    """Put the author's name before the words of each person, if `said` has more than one person's. Unnamed ones stay."""
    people = {one.author_id for one in said if one.role == Role.USER}
    if len(people) < 2:
        return list(said)
    return [
        replace(one, text=f"{one.author_name}: {one.text}") if one.role == Role.USER and one.author_name else one
        for one in said
    ]
