"""Memory: reads the messages of a scope with their vectors, and decides which of them a conversation may be shown.

The scope is part of each query. A direct message is visible to its two parties, a channel's messages to that channel with
its threads, and, if the operator allows it, a public channel's messages to its whole space (law 8). Each message has the
number of its channel's scope, so that the newest of a scope, and those with a word, are found without reading the rest.
Vectors are stored with eight bits per dimension. The methods are synchronous; call them through `Database.call`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from bot.memory.index import Entry
from bot.store import word_index
from bot.store.conversations import MESSAGE_COLUMNS, ConversationStore, as_message
from bot.store.database import Database
from bot.store.sources import find_authors_behind
from bot.store.tables import chunks, compute_scope, conversations, embeddings, messages, turns, users
from bot.types import FORGOTTEN, Conversation, Message, Role

MessageText = tuple[str, str]  # a message's id and its text
MESSAGES_BEFORE = 2  # messages before one, with which it is ranked


class Memory:
    """The messages that may be recalled in each scope, in the database."""

    def __init__(self, database: Database, across_channels: bool = False):
        self.database = database
        self.across_channels = across_channels

    def scope_key(self, place: Conversation) -> str:
        """Return the key of a conversation's scope. Conversations with the same key may see the same messages."""
        wide = self.across_channels and place.is_public
        return "\0".join((place.platform, place.space, *(() if wide else (place.channel,)), str(wide)))

    def read_conversation(self, conversation_id: str) -> Conversation:
        """Return a conversation by its id."""
        return ConversationStore(self.database).read_conversation(conversation_id)

    def read_since(self, place: Conversation, after: str, space: str, limit: int | None = None) -> list[Entry]:
        """Return the messages of a conversation's scope after the id `after` ("" for all), oldest first, with their vectors
        in `space`; at most the `limit` newest.
        """
        with self.database.read() as connection:
            values = self._values(connection, place) | {"vectors": space, "after": after, "most": limit}
            rows = connection.execute(_SINCE if limit is None else _NEWEST_SINCE, values).all()
        return _make_entries(rows)

    def find_older(self, place: Conversation, question: str, before: str, space: str, limit: int) -> list[Entry]:
        """Return the `limit` messages of a scope before the id `before` that share the rarest words with a question, each
        with the two before it in its conversation, oldest first.
        """
        with self.database.read() as connection:
            values = self._values(connection, place) | {"vectors": space}
            ids = word_index.find(connection, values["scopes"], question, before, limit)
            wanted = set(ids)
            for _ in range(MESSAGES_BEFORE):
                ids = [one for one in connection.execute(_PREVIOUS, {"ids": ids}).scalars() if one is not None]
                wanted.update(ids)
            return _make_entries(connection.execute(_OF_IDS, values | {"ids": sorted(wanted)}).all())

    def _values(self, connection: sa.Connection, place: Conversation) -> dict[str, Any]:
        own = compute_scope(place.platform, place.space, place.channel)
        scopes = {own}
        if self.across_channels and place.is_public:
            public = connection.execute(_PUBLIC, {"platform": place.platform, "in_space": place.space}).scalars()
            scopes.update(scope for scope in public if scope is not None)
        return {"own": own, "scopes": sorted(scopes)}

    def find_visible(self, conversation_id: str, ids: Sequence[str]) -> dict[str, Message]:
        """Return those of these messages, by id, that a conversation may be shown now.

        They are in its scope, not forgotten, no answer that was regenerated, and neither by a person who withholds consent
        nor made from such a person's messages.
        """
        place = self.read_conversation(conversation_id)
        found: dict[str, Message] = {}
        with self.database.read() as connection:
            values = self._values(connection, place) | {"platform": place.platform}
            for chunk in chunks(ids):
                found.update((row.id, as_message(row)) for row in connection.execute(_VISIBLE, values | {"ids": chunk}))
            unwilling = set(connection.execute(_unwilling, {"platform": place.platform}).scalars())
            if unwilling:
                answers = [one.id for one in found.values() if one.role == Role.ASSISTANT]
                made = {row.id: row.reply_id for row in connection.execute(_ANSWERS, {"ids": answers})}
                for turn_id, people in find_authors_behind(connection, made).items():
                    if people & unwilling:
                        del found[made[turn_id]]
        return found

    def find_remaining(self, ids: Iterable[str]) -> set[str]:
        """Return the ids of those of these messages that still have a text: they are neither forgotten nor deleted."""
        with self.database.read() as connection:
            return {one for some in chunks(ids) for one in connection.execute(_KEPT, {"ids": some}).scalars()}

    def read_vectors(self, ids: Sequence[str], space: str) -> dict[str, np.ndarray]:
        """Return the unit vectors (1-D float32) in `space` of these messages, by id. Messages without one are left out."""
        with self.database.read() as connection:
            rows = connection.execute(_VECTORS, {"ids": list(ids), "vectors": space})
            return {row.message_id: _unpack(row.vector) for row in rows}

    def store_vectors(self, texts: Sequence[MessageText], vectors: np.ndarray, space: str) -> dict[str, np.ndarray]:
        """Store the unit vectors (n × dimensions, float32) of messages, unless their text has changed or is gone.

        Returns the stored vectors (1-D int8) by id.
        """
        kept: dict[str, np.ndarray] = {}
        with self.database.begin() as connection:
            for (message_id, text), vector in zip(texts, vectors, strict=True):
                row = connection.execute(_TEXT, {"id": message_id}).one_or_none()
                if row is not None and row.text == text:
                    connection.execute(_FORGET, {"id": message_id})
                    place = {"conversation_id": row.conversation_id, "message_id": message_id}
                    packed = _pack(vector)
                    connection.execute(_KEEP, place | {"space": space, "vector": packed})
                    kept[message_id] = np.frombuffer(packed, np.int8)
        return kept

    def find_unembedded(self, space: str, after: str, limit: int) -> list[MessageText]:
        """Return at most `limit` messages without a vector in `space`, in order of id, after the id `after` ("" for all)."""
        with self.database.read() as connection:
            rows = connection.execute(_MISSING, {"vectors": space, "after": after, "most": limit})
            return [(row.id, row.text) for row in rows]

    def count_unembedded(self, space: str) -> int:
        """Count the messages without a vector in `space`."""
        query = sa.select(sa.func.count()).select_from(_MISSING.order_by(None).limit(None).subquery())
        with self.database.read() as connection:
            return connection.execute(query, {"vectors": space, "after": ""}).scalar_one()


def _pack(vector: np.ndarray) -> bytes:
    """Return a vector's direction with eight bits per dimension."""
    return np.round(vector * (127 / max(float(np.abs(vector).max()), 1e-9))).astype(np.int8).tobytes()


def _unpack(packed: bytes) -> np.ndarray:
    vector = np.frombuffer(packed, np.int8).astype(np.float32)
    return vector / (np.linalg.norm(vector) or 1.0)


def _make_entries(rows: Iterable[Any]) -> list[Entry]:
    return [
        Entry(
            row.id,
            row.conversation_id,
            row.author_id,
            row.text,
            row.vector and np.frombuffer(row.vector, np.int8),
            row.role == Role.ASSISTANT,
        )
        for row in rows
    ]


_vectors = sa.and_(embeddings.c.message_id == messages.c.id, embeddings.c.conversation_id == messages.c.conversation_id)
_vectors = sa.and_(_vectors, embeddings.c.space == sa.bindparam("vectors"))
_said = sa.and_(messages.c.author_id != FORGOTTEN, messages.c.text != "")
_KEPT = sa.select(messages.c.id).where(messages.c.id.in_(sa.bindparam("ids", expanding=True)), _said)
_ENTRIES = (
    sa.select(messages.c.id, messages.c.conversation_id, messages.c.author_id, messages.c.text)
    .add_columns(embeddings.c.vector, messages.c.role)
    .join(conversations, conversations.c.id == messages.c.conversation_id)
    .outerjoin(embeddings, _vectors)
    .where(_said, sa.or_(messages.c.scope == sa.bindparam("own"), conversations.c.is_public))
    .order_by(messages.c.id)
)
_new = sa.and_(
    messages.c.scope.in_(sa.bindparam("scopes", expanding=True)), messages.c.id > sa.bindparam("after", type_=sa.String)
)
_SINCE = _ENTRIES.where(_new)
_newest = sa.select(messages.c.id).where(_new).order_by(messages.c.id.desc()).limit(sa.bindparam("most")).subquery()
_NEWEST_SINCE = _ENTRIES.where(messages.c.id.in_(sa.select(_newest.c.id)))
_OF_IDS = _ENTRIES.where(messages.c.id.in_(sa.bindparam("ids", expanding=True)))
_previous = messages.alias()
_PREVIOUS = sa.select(
    sa.select(_previous.c.id)
    .where(
        _previous.c.conversation_id == messages.c.conversation_id,
        sa.tuple_(_previous.c.at, _previous.c.id) < sa.tuple_(messages.c.at, messages.c.id),
    )
    .order_by(_previous.c.at.desc(), _previous.c.id.desc())
    .limit(1)
    .correlate(messages)
    .scalar_subquery()
).where(messages.c.id.in_(sa.bindparam("ids", expanding=True)))
_of_space = (
    conversations.c.platform == sa.bindparam("platform"),
    conversations.c.space == sa.bindparam("in_space"),
    conversations.c.is_public,
)
_public = sa.select(sa.func.min(conversations.c.scope).label("scope")).where(*_of_space).cte("public", recursive=True)
_next = sa.select(sa.func.min(conversations.c.scope)).where(*_of_space, conversations.c.scope > _public.c.scope)
# One lookup in the index per channel, however many conversations it has.
_PUBLIC = sa.select(
    _public.union_all(sa.select(_next.correlate(_public).scalar_subquery()).where(_public.c.scope.is_not(None))).c.scope
)
_later = turns.alias()
_superseded = sa.select(turns.c.reply_id).join(_later, _later.c.replaces == turns.c.id)
_superseded = _superseded.where(turns.c.reply_id == messages.c.id).correlate(messages)
_unwilling = sa.select(users.c.user_id).where(~users.c.consent, users.c.platform == sa.bindparam("platform"))
_ANSWERS = sa.select(turns.c.id, turns.c.reply_id).where(turns.c.reply_id.in_(sa.bindparam("ids", expanding=True)))
_VISIBLE = (
    sa.select(*MESSAGE_COLUMNS)
    .join(conversations, conversations.c.id == messages.c.conversation_id)
    .where(
        messages.c.id.in_(sa.bindparam("ids", expanding=True)),
        messages.c.scope.in_(sa.bindparam("scopes", expanding=True)),
        sa.or_(messages.c.scope == sa.bindparam("own"), conversations.c.is_public),
        _said,
        messages.c.author_id.not_in(_unwilling),
        ~_superseded.exists(),
    )
)
_TEXT = sa.select(messages.c.conversation_id, messages.c.text).where(
    messages.c.id == sa.bindparam("id"), messages.c.author_id != FORGOTTEN
)
_VECTORS = sa.select(embeddings.c.message_id, embeddings.c.vector).where(
    embeddings.c.message_id.in_(sa.bindparam("ids", expanding=True)), embeddings.c.space == sa.bindparam("vectors")
)
_KEEP = embeddings.insert()
_FORGET = embeddings.delete().where(embeddings.c.message_id == sa.bindparam("id"))
_MISSING = (
    sa.select(messages.c.id, messages.c.text)
    .outerjoin(embeddings, _vectors)
    .where(embeddings.c.message_id.is_(None), messages.c.id > sa.bindparam("after"), _said)
    .order_by(messages.c.id)
    .limit(sa.bindparam("most"))
)
