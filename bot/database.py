"""The tables, and the one place that takes database work off the event loop.

SQLite by default, PostgreSQL by URL, through SQLAlchemy Core; Alembic migrations stand beside this module. It knows the
shape of what is stored, not what it means: `bot.conversations` and `bot.registry` own their tables.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from bot.errors import DataError

Result = TypeVar("Result")
Job = tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]

metadata = sa.MetaData()


class UTCDateTime(sa.TypeDecorator):
    """A time in UTC: stored without a zone (SQLite has none), read back with one."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


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
    sa.UniqueConstraint("platform", "space", "channel", "thread"),
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
    sa.Index("messages_in_order", "conversation_id", "at", "id"),
    sa.Index("messages_of_conversations", "conversation_id", "id"),
)

embeddings = sa.Table(
    "embeddings",
    metadata,
    sa.Column("conversation_id", sa.ForeignKey("conversations.id"), primary_key=True),
    sa.Column("message_id", sa.ForeignKey("messages.id"), primary_key=True),
    sa.Column("space", sa.String(128), nullable=False),
    sa.Column("vector", sa.LargeBinary, nullable=False),
    sa.Index("embeddings_of_messages", "message_id"),
    sqlite_with_rowid=False,  # the vectors of a conversation lie beside each other
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
    sa.Column("sampling", sa.JSON, nullable=False),
    sa.Column("latency_ms", sa.Float, nullable=False),
    sa.Column("replaces", sa.String(64), index=True),
    sa.Column("shown", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("at", UTCDateTime, nullable=False),
    sa.Index("turns_in_order", "conversation_id", "at", "id"),
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
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("platform", sa.String(32), primary_key=True),
    sa.Column("message_id", sa.String(64), primary_key=True),
    sa.Column("channel", sa.String(128), nullable=False),
    sa.Column("turn_id", sa.String(64), nullable=False, index=True),  # may be recorded before its turn is
    sa.Column("part", sa.Integer, nullable=False),
    sa.Column("at", UTCDateTime, nullable=False, index=True),
)

policies = sa.Table(
    "policies",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    sa.Column("parent", sa.String(64)),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("replaced", sa.String(64)),
    sa.Column("metrics", sa.JSON, nullable=False),
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
    sa.Column("feedback_id", sa.ForeignKey("feedback.id"), primary_key=True),
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
    """The ids in lists that one statement can hold."""
    left = iter(ids)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


_POSTGRESQL = "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
_MEND = {
    "sqlite": "restore it from a backup, or move it away",
    "postgresql": "check the config key database.url, and that the server runs",
}


class _Local(threading.local):
    def __init__(self) -> None:
        self.afterwards: list[Callable[[], None]] = []  # what is to be done when that transaction is committed

    group: sa.Connection | None = None  # the transaction of the batch that this thread is at work on
    shared = False  # whether it is of more than one function
    savepoint: sa.NestedTransaction | None = None  # what the function at work has written


class Database:
    """One engine, and one thread for it, so that callers on the event loop never wait for a disk."""

    def __init__(self, url: str):
        try:
            self.engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        except ImportError as error:
            raise DataError(f"config key database.url needs a driver: {error}; pip install 'kibitz[postgresql]'") from error
        except sa.exc.ArgumentError as error:
            raise DataError(
                "config key database.url has a value that is no URL; write sqlite:///FILE, or " + _POSTGRESQL
            ) from error
        self.url = self.engine.url.render_as_string(hide_password=True)
        self.dialect = self.engine.dialect.name
        if self.dialect not in ("sqlite", "postgresql"):
            raise DataError(f"config key database.url has value '{self.url}'; write sqlite:///FILE, or " + _POSTGRESQL)
        if self.dialect == "sqlite":
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_immediate)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._waiting: deque[Job] = deque()
        self._local = _Local()

    def upgrade(self) -> None:
        """Bring the schema to this program's version; refuse a database from the future or a broken file."""
        config = AlembicConfig()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        try:
            with self.engine.begin() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
                if found is not None and found not in known:
                    raise DataError(
                        f"the database {self.url} has schema {found}, which this kibitz does not know; "
                        "install the kibitz that wrote it, or newer"
                    )
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except sa.exc.DatabaseError as error:
            raise DataError(
                f"the database {self.url} cannot be opened ({str(error.orig).splitlines()[0]}); {_MEND[self.dialect]}"
            ) from error

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end, rolled back on an error. Inside `call` it is a part of the call's own."""
        group = self._local.group
        if group is None:
            with self._together(), self.begin() as group:
                yield group
            return
        if not group.in_transaction():
            group.begin()
        if self._local.shared and self._local.savepoint is None:
            self._local.savepoint = group.begin_nested()
        yield group

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection to read with; it never takes the write lock."""
        group = self._local.group
        if group is not None and group.in_transaction():
            yield group  # what the batch wrote before is seen
            return
        with self.engine.connect().execution_options(read_only=True) as connection:
            yield connection

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a synchronous store function in the database's thread; when it returns, all that it wrote is committed.

        One that fails has written nothing. Functions that wait for the thread together are committed together (group
        commit): under load a commit, which waits for the disk, costs more than all else.
        """
        future: Future[Result] = Future()
        self._waiting.append((function, args, future))
        self._thread.submit(self._work)
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        batch = [job for job in batch if job[-1].set_running_or_notify_cancel()]
        if not batch:
            return
        settled: list[tuple[Future[Any], Any, BaseException | None]] = []
        self._local.shared = len(batch) > 1
        try:
            with self._together():
                for function, args, future in batch:
                    try:
                        settled.append((future, self._part(function, args), None))
                    except BaseException as error:
                        if not self._local.shared:
                            raise
                        settled.append((future, None, error))
        except BaseException as error:  # nothing of the batch is on disk
            settled = [(future, None, error) for *_, future in batch]
        for future, result, failure in settled:
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)

    def _part(self, function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
        """Run one function of a batch; beside others, what it writes has a savepoint, so that its failure harms none."""
        promised = len(self._local.afterwards)
        try:
            result = function(*args)
            if self._local.savepoint is not None:
                self._local.savepoint.commit()
        except BaseException:
            del self._local.afterwards[promised:]
            if self._local.savepoint is not None:
                self._local.savepoint.rollback()
            raise
        finally:
            self._local.savepoint = None
        return result

    @contextmanager
    def _together(self) -> Iterator[sa.Connection]:
        """A connection for all that is begun inside: committed together at the end, or not at all."""
        with self.engine.connect() as group:
            self._local.group = group
            try:
                yield group
                try:
                    group.commit()
                except BaseException:
                    group.invalidate()  # or it would go back to the pool with its transaction open
                    raise
            except BaseException:
                self._local.afterwards.clear()
                raise
            finally:
                self._local.group = None
        while self._local.afterwards:
            self._local.afterwards.pop(0)()

    def afterwards(self, work: Callable[[], None]) -> None:
        """Do something that must not happen unless what was written is committed: now, or when its batch is."""
        if self._local.group is None:
            work()
        else:
            self._local.afterwards.append(work)

    def scrub(self) -> None:
        """Leave nothing of what was deleted in the files: SQLite's log is emptied; free pages are zeroed as they come."""
        if self.dialect == "sqlite":
            with self.engine.connect().execution_options(read_only=True) as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Finish what is queued and close all connections."""
        self._thread.shutdown()
        self.engine.dispose()


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by us, below, not by the driver
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        "busy_timeout = 10000",
        "foreign_keys = ON",
        "secure_delete = ON",  # what is forgotten is gone from the file too (law 10)
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: sa.Connection) -> None:
    if not connection.get_execution_options().get("read_only"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
