"""Database: transactions, and the one place that takes database work off the event loop.

SQLite by default, PostgreSQL by URL, through SQLAlchemy Core. It knows no table and no statement: those are
`bot.store.tables`' and its owners'.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from bot.errors import DatabaseUnavailable, DataError, quote_error
from bot.store.outages import find_outage
from bot.store.write_ahead_log import WriteAheadLog

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Job = tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]

BUSY_SECONDS = 10.0  # how long SQLite waits for another program's transaction
_FORMS = "write sqlite:///FILE, or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


class _Local(threading.local):
    def __init__(self) -> None:
        self.after_commit: list[Callable[[], None]] = []  # what is to be done when that transaction is committed

    group: sa.Connection | None = None  # the transaction of the batch that this thread is at work on
    shared = False  # whether it is of more than one function
    savepoint: sa.NestedTransaction | None = None  # what the function at work has written


class Database:
    """One engine, and one thread for it, so that callers on the event loop never wait for a disk.

    `directory` is where files lie that belong to the database: by default, where SQLite's own file is.
    """

    def __init__(self, url: str, directory: Path | None = None, is_read_only: bool = False):
        """Open nothing yet. What `is_read_only` leaves a file of SQLite as it is, and makes none."""
        parts = _read_url(url)
        self.url = _without_secrets(parts)
        self.dialect = parts.get_backend_name()
        try:
            # Error messages must not spell what people wrote.
            self.engine = sa.create_engine(parts, pool_pre_ping=self.dialect != "sqlite", hide_parameters=True)
        except ImportError as error:
            raise DataError(f"config key database.url needs a driver: {error}; pip install 'kibitz[postgresql]'") from error
        except sa.exc.ArgumentError as error:
            raise DataError(f"config key database.url has value '{self.url}'; {_FORMS}") from error
        if self.dialect == "sqlite" and not is_read_only:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_immediate)
        sa.event.listen(self.engine, "handle_error", _hide_rows)
        self.file = Path(self.engine.url.database or "") if self.dialect == "sqlite" else None
        self.directory = directory or (self.file.parent if self.file else None)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database")
        self._waiting: deque[Job] = deque()
        self._local = _Local()
        self._wal = WriteAheadLog(self.engine) if self.dialect == "sqlite" else None

    def upgrade(self) -> None:
        """Bring the schema to this program's version; refuse a database from the future or a broken file."""
        if self.find_revision() == self.newest_revision:
            return  # without the write lock
        with self._translate_errors(), self.engine.begin() as connection:
            config = _make_alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def find_revision(self) -> str | None:
        """Return the revision of the database's schema, None where it has none yet. Nothing is changed.

        Raises DataError where the database is from the future, or is none.
        """
        if self.file is not None and not self.file.exists():
            return None
        with self._translate_errors(), self.engine.connect().execution_options(read_only=True) as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in {one.revision for one in _load_migrations().walk_revisions()}:
            raise DataError(
                f"the database {self.url} has schema {found}, which this kibitz does not know; "
                "install the kibitz that wrote it, or newer"
            )
        return found

    @property
    def newest_revision(self) -> str | None:
        """The revision of this program's schema."""
        return _load_migrations().get_current_head()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise what a database says inside that cannot be used as DataError."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise find_outage(error, self.url) or DataError(
                f"the database {self.url} cannot be used ({quote_error(error)}); check the config key database.url"
            ) from error

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end, rolled back on an error. Inside `call` it is a part of the call's own.

        Raises DatabaseUnavailable, here as in `read` and `call`, where the database is locked, full or gone.
        """
        group = self._local.group
        if group is None:
            with self._group_commit(), self.begin() as group:
                yield group
            return
        with self._translate_outages():
            if not group.in_transaction():
                group.begin()
            if self._local.shared and self._local.savepoint is None:
                self._local.savepoint = group.begin_nested()
            yield group

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection to read with; it never takes the write lock."""
        group = self._local.group
        with self._translate_outages():
            if group is not None and group.in_transaction():
                yield group  # what the batch wrote before is seen
                return
            with self.engine.connect().execution_options(read_only=True) as connection:
                yield connection

    def call(self, function: Callable[..., Result], *args: Any) -> asyncio.Future[Result]:
        """Run a synchronous store function in the database's thread; when it returns, all that it wrote is committed.

        It is queued at once: functions run in the order of these calls. One that fails has written nothing. Those that wait
        for the thread together are committed together (group commit): under load a commit, which waits for the disk, costs
        more than all else.
        """
        future: Future[Result] = Future()
        with_ids = partial(copy_context().run, function)  # what it logs has the ids of who asked
        self._waiting.append((with_ids, args, future))
        self._thread.submit(self._run_batch)
        return asyncio.wrap_future(future)

    def _run_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
        batch = [job for job in batch if job[-1].set_running_or_notify_cancel()]
        if not batch:
            return
        settled: list[tuple[Future[Any], Any, BaseException | None]] = []
        self._local.shared = len(batch) > 1
        try:
            with self._group_commit():
                for function, args, future in batch:
                    try:
                        settled.append((future, self._run_job(function, args), None))
                    except DatabaseUnavailable:
                        raise  # SQLite may have undone all that the batch wrote, on a full disk for one
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

    def _run_job(self, function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
        """Run one function of a batch; beside others, what it writes has a savepoint, so that its failure harms none."""
        promised = len(self._local.after_commit)
        try:
            with self._translate_outages():
                result = function(*args)
                if self._local.savepoint is not None:
                    self._local.savepoint.commit()
        except DatabaseUnavailable:
            raise  # and with it the whole transaction
        except BaseException:
            del self._local.after_commit[promised:]
            if self._local.savepoint is not None:
                self._local.savepoint.rollback()
            raise
        finally:
            self._local.savepoint = None
        return result

    @contextmanager
    def _group_commit(self) -> Iterator[sa.Connection]:
        """A connection for all that is begun inside: committed together at the end, or not at all."""
        with self._translate_outages(), self.engine.connect() as group:
            self._local.group = group
            try:
                yield group
                try:
                    group.commit()
                except BaseException:
                    group.invalidate()  # or it would go back to the pool with its transaction open
                    raise
            except BaseException:
                self._local.after_commit.clear()
                raise
            finally:
                self._local.group, self._local.shared = None, False
        while self._local.after_commit:
            self._local.after_commit.pop(0)()

    @contextmanager
    def _translate_outages(self) -> Iterator[None]:
        """Raise an outage inside as DatabaseUnavailable; every other error stays what it is."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            found = find_outage(error, self.url)
            if found is None:
                raise
            raise found from error

    def run_after_commit(self, work: Callable[[], None]) -> None:
        """Do something that must not happen unless what was written is committed: now, or when its batch is.

        If it fails that is logged, and nobody is told that the commit failed.
        """
        if self._local.group is None:
            _run_or_log(work)
        else:
            self._local.after_commit.append(partial(copy_context().run, _run_or_log, work))

    def scrub(self) -> None:
        """Leave nothing of what was deleted in the files: SQLite's log is emptied; free pages are zeroed as they come.

        Nothing waits: while others read, it is done in the background.
        """
        if self._wal is not None:
            self._wal.empty()

    def close(self) -> None:
        """Finish what is queued and close all connections."""
        self._thread.shutdown()
        if self._wal is not None:
            self._wal.close()
        self.engine.dispose()


@cache  # each of its files is a module that is loaded
def _load_migrations() -> ScriptDirectory:
    return ScriptDirectory.from_config(_make_alembic_config())


def _make_alembic_config() -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _run_or_log(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        log.exception("work after a commit failed; what was committed stays")


def _read_url(url: str) -> sa.URL:
    """The parts of a database's URL. Raises DataError for what is none, or names no database that is kept."""
    try:
        parts = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:  # ValueError: of a port that is no number
        raise DataError(f"config key database.url has a value that is no URL; {_FORMS}") from error
    if parts.get_backend_name() not in ("sqlite", "postgresql"):
        raise DataError(f"config key database.url has value '{_without_secrets(parts)}', another database; {_FORMS}")
    if parts.get_backend_name() == "sqlite" and (
        not parts.database or ":memory:" in parts.database or parts.query.get("mode") == "memory"
    ):
        raise DataError(
            f"config key database.url has value '{_without_secrets(parts)}', which keeps nothing when kibitz ends; {_FORMS}"
        )
    return parts


def _without_secrets(url: sa.URL) -> str:
    return url.set(query={}).render_as_string(hide_password=True)  # a query may hold a password too


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by us, below, not by the driver
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        f"busy_timeout = {BUSY_SECONDS * 1000:.0f}",
        "foreign_keys = ON",
        "secure_delete = ON",  # what is forgotten is gone from the file too (law 10)
    ):
        connection.execute(f"PRAGMA {pragma}")


def _hide_rows(context: sa.engine.ExceptionContext) -> None:
    """Leave of an error what its first line says: PostgreSQL quotes the row in further lines, and errors come into logs."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args and isinstance(error.args[0], str):
            error.args = (error.args[0].partition("\n")[0], *error.args[1:])


def _begin_immediate(connection: sa.Connection) -> None:
    if not connection.get_execution_options().get("read_only"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
