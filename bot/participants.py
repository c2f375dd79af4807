"""Participants: who wrote in which channel (law 7: only those who took part may teach).

A channel is many conversations: on Discord each mention is one. It knows no opinions.
"""

from collections.abc import Iterable
from functools import cache

import sqlalchemy as sa

from bot.database import Database
from bot.tables import chunks, conversations, messages
from bot.types import Role

_WHERE = ("person", "platform", "space", "channel")
_CHANNEL = [conversations.c[name] for name in _WHERE[1:]]
_there = sa.exists().where(
    conversations.c.id == messages.c.conversation_id, *(one == sa.bindparam(one.name) for one in _CHANNEL)
)
_WROTE = (
    sa.select(messages.c.id)
    .where(messages.c.author_id == sa.bindparam("person"), messages.c.role == Role.USER, _there)
    .limit(1)  # however much they wrote
)


def find_participants(database: Database, asked: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return those of `asked`, pairs of a conversation and a person, whose person wrote in its channel."""
    pairs = set(asked)
    places = sa.select(conversations.c.id, *_CHANNEL)
    with database.read() as connection:
        channels = {
            row.id: [getattr(row, column.name) for column in _CHANNEL]
            for ids in chunks({place for place, _ in pairs})
            for row in connection.execute(places.where(conversations.c.id.in_(ids)))
        }
        wrote = cache(lambda *there: connection.execute(_WROTE, dict(zip(_WHERE, there, strict=True))).first())
        return {(place, one) for place, one in pairs if wrote(one, *channels[place])}
