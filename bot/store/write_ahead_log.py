"""Empty SQLite's write-ahead log and rebuild its file, so that no deleted text stays in them.

The log cannot be emptied while anybody reads from it. Then WriteAheadLog retries in the background and tells the operator.

`secure_delete` overwrites a deleted row, but not the copies that SQLite leaves in unused parts of pages when it moves rows
to other pages. Only a rebuilt file (VACUUM) has none. A rebuild stops all writers, so a large file is not rebuilt.
"""

import logging
import threading
import time
from pathlib import Path

import sqlalchemy as sa

from bot.errors import quote_error

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before a retry; the pause doubles each time
LARGEST_REBUILT = 64 * 2**20  # bytes: a rebuild takes some tenths of a second
IDLE_WAIT_SECONDS = 1.0  # seconds; a longer delay is logged, and `close` waits so long


class WriteAheadLog:
    """The write-ahead log of one SQLite database. Thread-safe. Only `close` blocks."""

    def __init__(self, engine: sa.Engine):
        self._engine = engine
        self._lock = threading.Lock()  # protects the fields below
        self._timer: threading.Timer | None = None  # for the next retry, set until one succeeds
        self._asked = 0  # how often `empty` was called
        self._is_told = False
        self._is_closed = False

    @property
    def is_waiting(self) -> bool:
        """Whether the log is not empty yet, or the file not rebuilt, and a try is due."""
        return self._timer is not None

    def empty(self) -> None:
        """Empty the log now, or as soon as nobody reads from it. Rebuild a small file soon, in the background."""
        with self._lock:
            self._asked += 1
        self._try_to_empty(FIRST_PAUSE)

    def close(self) -> None:
        """Try a last time if a try is due. Tell the operator if that fails."""
        with self._lock:
            self._is_closed = True
            timer = self._timer
        if timer is None:
            return
        timer.cancel()
        timer.join()
        deadline = time.monotonic() + IDLE_WAIT_SECONDS
        while (hindrance := self._find_hindrance(self._is_small())) is not None and time.monotonic() < deadline:
            time.sleep(FIRST_PAUSE)
        if hindrance is not None:
            log.warning("%s (%s); it goes when kibitz starts the next time", self._remains_text, hindrance)

    def _try_to_empty(self, pause: float) -> None:
        """Try to empty the log, and in a retry to rebuild a small file.

        Retry after `pause` seconds, then with doubled pauses, until everything that was asked for is done.
        """
        is_retry, rebuilds, asked = threading.current_thread() is self._timer, self._is_small(), self._asked
        hindrance = self._find_hindrance(rebuilds and is_retry)
        with self._lock:
            is_rebuilt = is_retry and asked == self._asked  # nothing was deleted since
            if hindrance is None and (is_rebuilt or not rebuilds):
                if self._timer is not None:
                    self._timer.cancel()
                if self._is_told:
                    log.warning("what was deleted is gone from the files of %s now", self._engine.url.database)
                self._timer, self._is_told = None, False
            elif not self._is_closed and self._timer in (None, threading.current_thread()):
                if hindrance is not None and pause >= IDLE_WAIT_SECONDS and not self._is_told:
                    self._is_told = True
                    log.warning("%s (%s); kibitz tries again until it is gone", self._remains_text, hindrance)
                self._timer = threading.Timer(pause, self._try_to_empty, [min(2 * pause, LONGEST_PAUSE)])
                self._timer.daemon = True
                self._timer.start()

    @property
    def _remains_text(self) -> str:
        return f"what was deleted is still in the log of {self._engine.url.database}"

    def _is_small(self) -> bool:
        try:
            return Path(str(self._engine.url.database)).stat().st_size <= LARGEST_REBUILT
        except OSError:  # there is no file any more
            return False

    def _find_hindrance(self, rebuilds: bool) -> str | None:
        """Try to rebuild the file, if asked to, and to empty the log, without waiting. Return what prevents it, or None."""
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                patience = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
                connection.exec_driver_sql("PRAGMA busy_timeout = 0")
                try:
                    if rebuilds:
                        connection.exec_driver_sql("VACUUM")
                    is_busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
                finally:
                    connection.exec_driver_sql(f"PRAGMA busy_timeout = {patience}")
        except sa.exc.DBAPIError as error:
            return quote_error(error)
        return "another program, or a long command, is reading it" if is_busy else None
