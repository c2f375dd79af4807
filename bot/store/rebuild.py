"""Rebuild SQLite's file after something was erased, so that no erased text stays in unused parts of it.

`secure_delete` overwrites a deleted row, but not the copies that SQLite leaves in unused parts of pages when it moves rows
to other pages. Only a rebuilt file (VACUUM) has none. A rebuild writes the whole file and stops all writers. So all that is
erased within DELAY_SECONDS shares one, and a large file is rebuilt only while kibitz does not serve.

A row in `switches` says that a rebuild is due, so that a crash does not lose it. The transaction that erases writes the row.
It goes when the file is rebuilt and the write-ahead log is empty.
"""

import logging
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from bot.errors import quote_error
from bot.store.tables import switches
from bot.store.write_ahead_log import WriteAheadLog
from bot.types import now

log = logging.getLogger(__name__)

DUE = "rebuild due"  # the name of a switch; `since` is the time of the latest erasure
DELAY_SECONDS = 300.0  # from the first erasure to the rebuild of a small file
LARGEST_SMALL = 64 * 2**20  # bytes: the rebuild of a small file takes some tenths of a second

_SINCE = sa.select(switches.c.since).where(switches.c.name == DUE)


def mark_rebuild_due(connection: sa.Connection) -> None:
    """Record in the transaction of an erasure that SQLite's file must be rebuilt. PostgreSQL needs no rebuild."""
    if connection.dialect.name == "sqlite":
        connection.execute(switches.delete().where(switches.c.name == DUE))
        connection.execute(switches.insert().values(name=DUE, since=now()))


class Rebuild:
    """The rebuild of one SQLite file. Thread-safe. Only `run` and `close` block."""

    def __init__(self, engine: sa.Engine, wal: WriteAheadLog):
        self._engine = engine
        self._wal = wal
        self._lock = threading.Lock()  # protects the fields below
        self._timer: threading.Timer | None = None  # for the planned rebuild
        self._covered: datetime | None = None  # the file has nothing that was erased until then; its log may
        self._tell_at_close: Callable[[str], None] | None = None
        self._is_told = False  # that erased words remain
        self._is_closed = False

    def plan(self) -> None:
        """If a rebuild is due, rebuild a small file after DELAY_SECONDS. Tell the operator when a large file is rebuilt."""
        if self._find_due() is not None:
            self._plan()

    def run(self, tell: Callable[[str], None]) -> None:
        """If a rebuild is due, rebuild the file now, whatever its size. Announce a long rebuild with `tell`."""
        if self._find_due() is None:
            return
        if self._is_large:
            size = _describe_size(self._size)
            tell(f"rebuilding the database ({size}), because something was forgotten; this takes some seconds per GB")
        if not self._try():
            self._plan()

    def run_at_close(self, tell: Callable[[str], None]) -> None:
        """Have `close` do what `run` does, because nobody is served. Then nothing is planned."""
        self._tell_at_close = tell

    def close(self) -> None:
        """Run a planned rebuild now. Tell the operator if that fails."""
        if self._tell_at_close is not None:
            self.run(self._tell_at_close)
        with self._lock:
            self._is_closed = True
            timer = self._timer
        if timer is None:
            return
        timer.cancel()
        timer.join()
        self._run_planned()

    def _plan(self) -> None:
        if self._tell_at_close is not None:
            return
        if self._is_large:
            self._warn_once(f"kibitz rebuilds the file ({_describe_size(self._size)}) when it starts the next time")
        else:
            self._start_timer()

    def _start_timer(self) -> None:
        with self._lock:
            if self._timer is not None or self._is_closed:
                return
            self._timer = threading.Timer(DELAY_SECONDS, self._run_planned)
            self._timer.daemon = True
            self._timer.start()

    def _run_planned(self) -> None:
        is_done = not self._is_large and self._try()
        with self._lock:
            self._timer = None  # only now, so that `close` waits for the rebuild
        if is_done:
            self.plan()  # for what was erased meanwhile
        else:
            self._plan()

    def _try(self) -> bool:
        """Rebuild the file if that is due, and empty the log. Return whether nothing prevents it. Log what does."""
        try:
            due = self._find_due()
            if due is None:
                return True
            with self._engine.connect().execution_options(read_only=True) as connection:
                connection.exec_driver_sql("VACUUM")
        except sa.exc.DBAPIError as error:
            self._warn_once(f"the file cannot be rebuilt ({quote_error(error)}), and kibitz tries again later")
            self._wal.empty()  # the failure may have filled it
            return False
        with self._lock:
            self._covered = due
            if self._is_told:
                log.warning("%s was rebuilt and no longer holds what was deleted", self._engine.url.database)
            self._is_told = False
        self._wal.empty(self._clear)
        return True

    def _find_due(self) -> datetime | None:
        """Return the time of the latest erasure that is still in the file, or None."""
        with self._engine.connect().execution_options(read_only=True) as connection:
            due = connection.execute(_SINCE).scalar_one_or_none()
        return None if due == self._covered else due

    def _clear(self) -> None:
        """Record that nothing is due any more, unless something was erased since the rebuild."""
        try:
            with self._engine.begin() as connection:
                connection.execute(switches.delete().where(switches.c.name == DUE, switches.c.since == self._covered))
        except sa.exc.DBAPIError as error:
            log.warning("%s will be rebuilt once more (%s)", self._engine.url.database, quote_error(error))
            self._covered = None
            self._start_timer()

    def _warn_once(self, remedy: str) -> None:
        with self._lock:
            is_told, self._is_told = self._is_told, True
        if not is_told:
            log.warning("unused parts of %s may still hold what was deleted; %s", self._engine.url.database, remedy)

    @property
    def _is_large(self) -> bool:
        return self._size > LARGEST_SMALL

    @property
    def _size(self) -> int:
        """The size of the file in bytes, or 0 if there is none any more."""
        try:
            return Path(str(self._engine.url.database)).stat().st_size
        except OSError:
            return 0


def _describe_size(size: int) -> str:
    """Return a size in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
