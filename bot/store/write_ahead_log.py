"""Empty SQLite's write-ahead log, so that no deleted text stays in it.

The log cannot be emptied while anybody reads from it. Then WriteAheadLog retries in the background and tells the operator.
"""

import logging
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa

from bot.errors import quote_error

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # seconds before a retry; the pause doubles each time
IDLE_WAIT_SECONDS = 1.0  # seconds; a longer delay is logged, and `close` waits so long


class WriteAheadLog:
    """The write-ahead log of one SQLite database. Thread-safe. Only `close` blocks."""

    def __init__(self, engine: sa.Engine):
        self._engine = engine
        self._lock = threading.Lock()  # protects the fields below
        self._timer: threading.Timer | None = None  # for the next retry, set until one succeeds
        self._asked = 0  # how often `empty` was called
        self._then: list[Callable[[], None]] = []  # to be called when the log is empty
        self._is_told = False
        self._is_closed = False

    def empty(self, then: Callable[[], None] | None = None) -> None:
        """Empty the log now, or as soon as nobody reads from it. Call `then` when it is empty."""
        with self._lock:
            self._asked += 1
            if then is not None:
                self._then.append(then)
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
        while (hindrance := self._find_hindrance()) is not None and time.monotonic() < deadline:
            time.sleep(FIRST_PAUSE)
        if hindrance is not None:
            log.warning("%s (%s); it goes when kibitz starts the next time", self._remains_text, hindrance)
            return
        for then in self._then:
            then()

    def _try_to_empty(self, pause: float) -> None:
        """Try to empty the log. Retry after `pause` seconds, then with doubled pauses, until it is empty."""
        asked, done = self._asked, []
        hindrance = self._find_hindrance()
        with self._lock:
            if hindrance is None and asked == self._asked:  # nothing was deleted since
                if self._timer is not None:
                    self._timer.cancel()
                if self._is_told:
                    log.warning("what was deleted is gone from the log of %s now", self._engine.url.database)
                self._timer, self._is_told = None, False
                done, self._then = self._then, []
            elif not self._is_closed and self._timer in (None, threading.current_thread()):
                if hindrance is not None and pause >= IDLE_WAIT_SECONDS and not self._is_told:
                    self._is_told = True
                    log.warning("%s (%s); kibitz tries again until it is gone", self._remains_text, hindrance)
                self._timer = threading.Timer(pause, self._try_to_empty, [min(2 * pause, LONGEST_PAUSE)])
                self._timer.daemon = True
                self._timer.start()
        for then in done:
            then()

    @property
    def _remains_text(self) -> str:
        return f"what was deleted is still in the log of {self._engine.url.database}"

    def _find_hindrance(self) -> str | None:
        """Try to empty the log, without waiting. Return what prevents it, or None."""
        try:
            with self._engine.connect().execution_options(read_only=True) as connection:
                patience = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
                connection.exec_driver_sql("PRAGMA busy_timeout = 0")
                try:
                    is_busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
                finally:
                    connection.exec_driver_sql(f"PRAGMA busy_timeout = {patience}")
        except sa.exc.DBAPIError as error:
            return quote_error(error)
        return "another program, or a long command, is reading it" if is_busy else None
