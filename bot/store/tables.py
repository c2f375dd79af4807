"""The tables of the database. `bot/store/migrations` has the Alembic migrations."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from bot.records import Record
from bot.types import Metrics, SamplingParams, Selection

metadata = sa.MetaData()


class UTCDateTime(sa.TypeDecorator):
    """A time in UTC. It is stored without a zone, because SQLite has none, and read back with one."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class RecordJSON(sa.TypeDecorator):
    """A Record of one kind, stored as JSON. None is stored as NULL."""

    impl = sa.JSON
    cache_ok = True

    def __init__(self, kind: type[Record]):
        super().__init__(none_as_null=True)
        self.kind = kind

    def process_bind_param(self, value: Record | None, dialect: Any) -> dict[str, Any] | None:
        return None if value is None else value.as_json()

    def process_result_value(self, value: dict[str, Any] | None, dialect: Any) -> Record | None:
        return None if value is None else self.kind.from_json(value)


def compute_scope(platform: str, space: str, channel: str) -> int:
    """Return the scope (63 bits) of a channel with its threads. Recall does not cross scopes."""
    digest = hashlib.blake2b(json.dumps([platform, space, channel]).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _compute_row_scope(context: Any) -> int:
    row = context.get_current_parameters()
    return compute_scope(row["platform"], row["space"], row["channel"])


def _id() -> sa.Column:
    return sa.Column("id", sa.String(64), primary_key=True)


conversations = sa.Table(
    "conversations",
    metadata,
    _id(),
    sa.Column("platform", sa.String(32), nullable=False),
    sa.Column("space", sa.String(128), nullable=False),
    sa.Column("channel", sa.String(128), nullable=False),
    sa.Column("thread", sa.String(128), nullable=False),
    sa.Column("is_public", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("scope", sa.BigInteger, nullable=False, default=_compute_row_scope, server_default="0"),
    sa.UniqueConstraint("platform", "space", "channel", "thread"),
    sa.Index("conversations_of_spaces", "platform", "space", "is_public", "scope"),
)

messages = sa.Table(
    "messages",
    metadata,
    _id(),
    sa.Column("conversation_id", sa.ForeignKey("conversations.id"), nullable=False),
    sa.Column("author_id", sa.String(128), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("reply_to", sa.String(64)),
    sa.Column("event_id", sa.String(128), unique=True),
    sa.Column("at", UTCDateTime, nullable=False),
    sa.Column("edited_at", UTCDateTime),
    sa.Column("author_name", sa.String(64), nullable=False, server_default=""),
    sa.Column("scope", sa.BigInteger, nullable=False, server_default="0"),  # the conversation's, copied
    sa.Index("messages_in_order", "conversation_id", "at", "id"),
    sa.Index("messages_of_scopes", "scope", "id"),
    sa.Index("messages_of_authors", "author_id", "scope"),
    sa.Index(
        *("messages_in_time", "at", "id"),  # only of messages that are not erased
        sqlite_where=sa.text("author_id <> ''"),
        postgresql_where=sa.text("author_id <> ''"),
    ),
)

embeddings = sa.Table(
    "embeddings",
    metadata,
    sa.Column("conversation_id", sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True),
    sa.Column("space", sa.String(128), nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Index("embeddings_of_messages", "message_id"),
    sqlite_with_rowid=False,  # stores the vectors of a conversation next to each other
)

words = sa.Table(  # the index of content words (`bot.store.word_index`)
    "words",
    metadata,
    sa.Column("scope", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("word", sa.String(64), primary_key=True),
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True),
    sa.Index("words_of_messages", "message_id"),
    sqlite_with_rowid=False,
)

turns = sa.Table(
    "turns",
    metadata,
    _id(),
    sa.Column("conversation_id", sa.ForeignKey("conversations.id"), nullable=False, index=True),
    sa.Column("message_id", sa.ForeignKey("messages.id"), nullable=False, index=True),
    sa.Column("reply_id", sa.ForeignKey("messages.id"), nullable=False, unique=True),
    sa.Column("asker_id", sa.String(128), nullable=False),
    sa.Column("policy_version", sa.String(64), nullable=False),
    sa.Column("prompt_ids", sa.JSON),
    sa.Column("completion_ids", sa.JSON),
    sa.Column("logprobs", sa.JSON),
    sa.Column("finish_reason", sa.String(32), nullable=False),
    sa.Column("sampling", RecordJSON(SamplingParams), nullable=False),
    sa.Column("latency_ms", sa.Float, nullable=False),
    sa.Column("replaces", sa.String(64), index=True),
    sa.Column("shown", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("selection", RecordJSON(Selection)),
    sa.Column("at", UTCDateTime, nullable=False),
    sa.Index("turns_in_order", "conversation_id", "at", "id"),
    sa.Index("turns_in_time", "at", "id"),
)

sources = sa.Table(  # the messages that each turn was made from: its question, and the keys of `shown`
    "sources",
    metadata,
    sa.Column("turn_id", sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True),
    sa.Index("sources_by_message", "message_id"),
    sqlite_with_rowid=False,
)

origins = sa.Table(  # the authors behind each turn whose sources were erased for their age
    "origins",
    metadata,
    sa.Column("turn_id", sa.ForeignKey("turns.id"), primary_key=True),
    sa.Column("user_id", sa.String(128), primary_key=True),
    sa.Index("origins_of_people", "user_id"),
    sqlite_with_rowid=False,
)

feedback = sa.Table(
    "feedback",
    metadata,
    _id(),
    sa.Column("turn_id", sa.ForeignKey("turns.id"), nullable=False, index=True),
    sa.Column("user_id", sa.String(128), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("signal", sa.String(64), nullable=False),
    sa.Column("retracts", sa.Boolean, nullable=False),
    sa.Column("value", sa.Float),
    sa.Column("text", sa.Text),
    sa.Column("event_id", sa.String(128), unique=True),
    sa.Column("at", UTCDateTime, nullable=False),
    sa.Index("feedback_of_people", "user_id", "turn_id"),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("platform", sa.String(32), primary_key=True),
    sa.Column("message_id", sa.String(64), primary_key=True),
    sa.Column("channel", sa.String(128), nullable=False),
    sa.Column("turn_id", sa.String(64), nullable=False, index=True),  # may be stored before its turn
    sa.Column("part", sa.Integer, nullable=False),
    sa.Column("at", UTCDateTime, nullable=False, index=True),
    sa.Index("deliveries_in_channels", "platform", "channel", "turn_id"),
)

policies = sa.Table(
    "policies",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("parent", sa.String(64)),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("replaced", sa.String(64)),
    sa.Column("metrics", RecordJSON(Metrics), nullable=False),
    sa.Column("created_at", UTCDateTime, nullable=False),
    sa.Index(
        "only_one_live",
        "state",
        unique=True,
        sqlite_where=sa.text("state = 'live'"),
        postgresql_where=sa.text("state = 'live'"),
    ),
)

runs = sa.Table(
    "runs",
    metadata,
    _id(),
    sa.Column("policy", sa.String(64), nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("started_at", UTCDateTime, nullable=False),
    sa.Column("ended_at", UTCDateTime),
)

run_feedback = sa.Table(
    "run_feedback",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("feedback_id", sa.ForeignKey("feedback.id"), primary_key=True, index=True),
)

run_followups = sa.Table(
    "run_followups",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True, index=True),
)

run_teachers = sa.Table(  # who taught a run; outlives their messages, and is deleted when they are forgotten
    "run_teachers",
    metadata,
    sa.Column("run_id", sa.ForeignKey("runs.id"), primary_key=True),
    sa.Column("platform", sa.String(32), primary_key=True),
    sa.Column("user_id", sa.String(128), primary_key=True),
    sa.Index("run_teachers_by_person", "platform", "user_id"),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("platform", sa.String(32), primary_key=True),
    sa.Column("user_id", sa.String(128), primary_key=True),
    sa.Column("consent", sa.Boolean, nullable=False),
    sa.Column("at", UTCDateTime, nullable=False),
    sa.Column("forgotten_at", UTCDateTime),
)

switches = sa.Table(
    "switches",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("since", UTCDateTime, nullable=False),
)

fingerprints = sa.Table(
    "fingerprints",
    metadata,
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True),
    sa.Column("platform", sa.String(32), nullable=False),
    sa.Column("space", sa.String(128), nullable=False),
    sa.Column("person", sa.String(128), nullable=False),
    sa.Column("words", sa.String(32), nullable=False),
    sa.Index("fingerprints_of_words", "platform", "space", "words", "message_id"),
)

followups = sa.Table(
    "followups",
    metadata,
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True),
    sa.Column("turn_id", sa.ForeignKey("turns.id"), nullable=False),
    sa.Column("chances", sa.JSON, nullable=False),
    sa.Index("followups_of_turns", "turn_id"),
)

CHUNK = 500  # ids in one IN (...): below every engine's limit on parameters


def chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    """Yield the ids in lists of at most CHUNK."""
    left = iter(ids)
    while chunk := list(islice(left, CHUNK)):
        yield chunk
