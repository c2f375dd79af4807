"""Database: transactions, and the thread that runs database work for the event loop.

SQLite by default, PostgreSQL by URL, through SQLAlchemy Core. It depends on no table but the one that a rebuild needs.
"""

import asyncio
import logging
import os
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
from bot.store.rebuild import Rebuild
from bot.store.write_ahead_log import WriteAheadLog

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Job = tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]

BUSY_SECONDS = 10.0  # how long SQLite waits for another program's transaction
_FORMS = "write sqlite:///FILE, or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"


class _Local(threading.local):
    def __init__(self) -> None:
        self.after_commit: list[Callable[[], None]] = []  # to be called when the transaction is committed

    group: sa.Connection | None = None  # the transaction of this thread's current batch
    shared = False  # whether the batch has more than one function
    savepoint: sa.NestedTransaction | None = None  # the writes of the current function


class Database:
    """An engine with one thread, so that the event loop never waits for a disk.

    `directory` is for files that belong to the database. Default: the directory of SQLite's file.
    """

    def __init__(self, url: str, directory: Path | None = None, is_read_only: bool = False):
        """Prepare an engine, and open nothing yet. With `is_read_only` an SQLite file is neither changed nor created.

        Raises DataError if the URL cannot be used.
        """
        parts = _read_url(url)
        self.url = _without_secrets(parts)
        self.dialect = parts.get_backend_name()
        try:
            # Error messages must not contain people's texts, which are parameters.
            self.engine = sa.create_engine(parts, pool_pre_ping=self.dialect != "sqlite", hide_parameters=True)
        except ImportError as error:
            raise DataError(f"config key database.url needs a driver: {error}; pip install 'kibitz[postgresql]'") from error
        except sa.exc.ArgumentError as error:
            raise DataError(f"config key database.url has value '{self.url}'; {_FORMS}") from error
        if self.dialect == "sqlite":
            sa.event.listen(self.engine, "connect", _keep_temporary_files_beside)
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
        self._rebuild = Rebuild(self.engine, self._wal) if self._wal is not None else None

    def upgrade(self) -> None:
        """Migrate the schema to this program's revision. Raises DataError if it is newer, or the file is broken."""
        if self.find_revision() == self.newest_revision:
            return  # without the write lock
        with self._translate_errors(), self.engine.begin() as connection:
            config = _make_alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def find_revision(self) -> str | None:
        """Return the revision of the database's schema, or None if it has none yet. Change nothing.

        Raises DataError if this program does not know the revision, or the file is not a database.
        """
        if self.file is not None and not self.file.exists():
            return None
        with self._translate_errors(), self.engine.connect().execution_options(read_only=True) as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in {one.revision for one in _load_migrations().walk_revisions()}:
            raise DataError(
                f"the database {self.url} has schema {found}, which this kibitz does not know; "
                "install the kibitz that wrote it, or a newer one"
            )
        return found

    @property
    def newest_revision(self) -> str | None:
        """The revision of this program's schema."""
        return _load_migrations().get_current_head()

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise errors of the driver inside as DataError."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            raise find_outage(error, self.url) or DataError(
                f"the database {self.url} cannot be used ({quote_error(error)}); check the config key database.url"
            ) from error

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """Begin a transaction, which is committed at the end and rolled back on an error. Inside `call` it joins the call's.

        Raises DatabaseUnavailable, as `read` and `call` do, if the database is locked, full or gone.
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
        """Yield a connection for reading, which never takes the write lock."""
        group = self._local.group
        with self._translate_outages():
            if group is not None and group.in_transaction():
                yield group  # this connection sees the batch's earlier writes
                return
            with self.engine.connect().execution_options(read_only=True) as connection:
                yield connection

    def call(self, function: Callable[..., Result], *args: Any) -> asyncio.Future[Result]:
        """Run a synchronous store function in the database's thread. The future is done when its writes are committed.

        Functions run in the order of the calls. One that fails writes nothing. Functions that wait for the thread at the
        same time are committed together (group commit), because a commit waits for the disk and costs the most under load.
        """
        future: Future[Result] = Future()
        with_ids = partial(copy_context().run, function)  # its log lines have the caller's ids
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
                        raise  # SQLite may have undone the whole batch, for example on a full disk
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
        """Run one function of a batch. In a shared batch it has a savepoint, so that its failure harms no other."""
        promised = len(self._local.after_commit)
        try:
            with self._translate_outages():
                result = function(*args)
                if self._local.savepoint is not None:
                    self._local.savepoint.commit()
        except DatabaseUnavailable:
            raise  # the whole transaction fails
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
        """Yield a connection for all transactions inside. They are committed together at the end, or not at all."""
        with self._translate_outages(), self.engine.connect() as group:
            self._local.group = group
            try:
                yield group
                try:
                    group.commit()
                except BaseException:
                    group.invalidate()  # otherwise it returns to the pool with an open transaction
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
        """Raise outages inside as DatabaseUnavailable. Other errors stay as they are."""
        try:
            yield
        except sa.exc.DBAPIError as error:
            found = find_outage(error, self.url)
            if found is None:
                raise
            raise found from error

    def run_after_commit(self, work: Callable[[], None]) -> None:
        """Call `work` once the current batch is committed, or now if there is none.

        An error of `work` is only logged, because the commit has succeeded.
        """
        if self._local.group is None:
            _run_or_log(work)
        else:
            self._local.after_commit.append(partial(copy_context().run, _run_or_log, work))

    def scrub(self) -> None:
        """Empty SQLite's log, which may contain deleted text, and plan a rebuild of the file if one is due.

        Does not block: while others read, the log is emptied in the background.
        """
        if self._wal is not None and self._rebuild is not None:
            self._wal.empty()
            self._rebuild.plan()

    def rebuild(self, tell: Callable[[str], None]) -> None:
        """Rebuild SQLite's file now if something was erased since the last time. Announce with `tell` if that takes long."""
        if self._rebuild is not None:
            self._rebuild.run(tell)

    def rebuild_at_close(self, tell: Callable[[str], None]) -> None:
        """Have `close` do what `rebuild` does. For commands: while somebody is served, a large file must not be rebuilt."""
        if self._rebuild is not None:
            self._rebuild.run_at_close(tell)

    def close(self) -> None:
        """Finish the queued calls, and a planned rebuild, and close all connections."""
        self._thread.shutdown()
        if self._wal is not None and self._rebuild is not None:
            self._rebuild.close()
            self._wal.close()
        self.engine.dispose()


@cache  # loading imports every migration
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
        log.exception("work after a commit failed; the commit stays")


def _read_url(url: str) -> sa.URL:
    """Return the parts of a database's URL. Raises DataError if it is invalid, unsupported or in memory."""
    try:
        parts = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:  # ValueError: the port is not a number
        raise DataError(f"config key database.url has a value that is not a URL; {_FORMS}") from error
    if parts.get_backend_name() not in ("sqlite", "postgresql"):
        raise DataError(f"config key database.url has value '{_without_secrets(parts)}', an unsupported database; {_FORMS}")
    if parts.get_backend_name() == "sqlite" and (
        not parts.database or ":memory:" in parts.database or parts.query.get("mode") == "memory"
    ):
        raise DataError(
            f"config key database.url has value '{_without_secrets(parts)}', which keeps nothing when kibitz ends; {_FORMS}"
        )
    return parts


def _without_secrets(url: sa.URL) -> str:
    return url.set(query={}).render_as_string(hide_password=True)  # a query may contain a password too


def _configure_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions; `_begin_immediate` does
    for pragma in (
        "journal_mode = WAL",
        "synchronous = FULL",
        f"busy_timeout = {BUSY_SECONDS * 1000:.0f}",
        "foreign_keys = ON",
        "secure_delete = ON",  # forgotten text must be gone from the file too (law 10)
    ):
        connection.execute(f"PRAGMA {pragma}")


def _keep_temporary_files_beside(connection: Any, _: Any) -> None:
    """Have SQLite write its temporary files, which contain people's texts, beside the database, unless SQLITE_TMPDIR is set.

    The setting is one for the whole process. SQLite reads SQLITE_TMPDIR only before the first connection.
    """
    *_, file = connection.execute("PRAGMA database_list").fetchone()
    directory = str(Path(file).parent)
    if "SQLITE_TMPDIR" in os.environ or not os.access(directory, os.W_OK | os.X_OK):
        return
    if connection.execute("PRAGMA temp_store_directory").fetchone() != (directory,):
        quoted = directory.replace("'", "''")
        connection.execute(f"PRAGMA temp_store_directory = '{quoted}'")


def _hide_rows(context: sa.engine.ExceptionContext) -> None:
    """Cut an error's text to its first line. PostgreSQL quotes the row in the others, and errors are logged."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None and error.args and isinstance(error.args[0], str):
            error.args = (error.args[0].partition("\n")[0], *error.args[1:])


def _begin_immediate(connection: sa.Connection) -> None:
    if not connection.get_execution_options().get("read_only"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
