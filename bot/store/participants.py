"""Find who wrote in which channel. Only participants may teach (law 7).

A channel has many conversations: on Discord each mention is one.
"""

from collections.abc import Iterable

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.tables import chunks, conversations, messages
from bot.types import Role

_SCOPES = sa.select(conversations.c.id, conversations.c.scope)
_WROTE = (
    sa.select(messages.c.id)
    .where(*(messages.c[name] == sa.bindparam(name) for name in ("author_id", "scope")), messages.c.role == Role.USER)
    .limit(1)  # one message is enough
)


def find_participants(database: Database, asked: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the pairs (conversation id, user id) of `asked` whose person wrote in the conversation's channel."""
    pairs = set(asked)
    with database.read() as connection:
        scopes = {
            row.id: row.scope
            for ids in chunks({place for place, _ in pairs})
            for row in connection.execute(_SCOPES.where(conversations.c.id.in_(ids)))
        }
        wrote = {
            (person, scope)
            for person, scope in {(person, scopes[place]) for place, person in pairs}
            if connection.execute(_WROTE, {"author_id": person, "scope": scope}).first()
        }
    return {(place, person) for place, person in pairs if (person, scopes[place]) in wrote}
