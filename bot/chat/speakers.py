"""Speakers: mark who says what if more than one person talks.

Connectors set the authors' names; the tracker shows them to the policy.
"""

from collections.abc import Sequence
from dataclasses import replace

from bot.types import Message, Role

LONGEST_NAME = 64  # characters


def clean_name(name: str) -> str:
    """Return a person's name in one line, without colons, which end a name, cut at LONGEST_NAME characters."""
    return " ".join(name.replace(":", " ").split())[:LONGEST_NAME]


def with_speakers(said: Sequence[Message]) -> list[Message]:
    """Put the author's name before each person's message if `said` has more than one person. Unnamed authors get none."""
    people = {one.author_id for one in said if one.role == Role.USER}
    if len(people) < 2:
        return list(said)
    return [
        replace(one, text=f"{one.author_name}: {one.text}") if one.role == Role.USER and one.author_name else one
        for one in said
    ]
