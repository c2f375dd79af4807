"""Supervision: restart failing tasks until they work, and report each failure once.

`Health` holds the tasks that fail now, for `/readyz`, `/status` and `kibitz status`.
"""

import asyncio
import contextlib
import json
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bot.errors import ConfigError, KibitzError, quote_first_line
from bot.types import now

log = logging.getLogger(__name__)

FIRST_PAUSE = 1.0  # seconds before the first retry; each further pause is twice as long
LONGEST_PAUSE = 60.0
STABLE_SECONDS = 120.0  # a continuous task that ran so long counts as working again

Tell = Callable[[str], None]
Start = Callable[[Coroutine[Any, Any, None]], None]


@dataclass(frozen=True)
class Failure:
    """A failing task's first failure and last reason."""

    since: datetime
    reason: str


class Health:
    """The tasks that fail now. Tells the operator when one begins to fail and when it works again.

    With a `file`, the failures are written there, so that another process can read them (`read_failures`).
    """

    def __init__(self, tell: Tell, file: Path | None = None):
        self.tell = tell
        self.failures: dict[str, Failure] = {}
        self._told: dict[str, set[str]] = {}
        self._file = file
        self._write()

    def record_failure(self, name: str, error: Exception) -> None:
        """Record that a task failed. Report each reason once until the task works again."""
        before, reason = self.failures.get(name), quote_first_line(error)
        is_ours = isinstance(error, KibitzError)
        told = self._told.setdefault(name, set())
        kind = reason if is_ours else type(error).__name__  # texts of libraries contain addresses and numbers
        if kind not in told:
            told.add(kind)
            self.tell(f"{name} failed: {reason} (kibitz goes on, and tries again)")
            if not is_ours:  # without the error's text: libraries may quote people's messages
                log.error("%s failed at\n%s", name, "".join(traceback.format_tb(error.__traceback__)))
        if before is None or before.reason != reason:
            self.failures[name] = Failure(before.since if before else now(), reason)
            self._write()

    def record_recovery(self, name: str) -> None:
        """Record that a task works, and tell the operator if it failed before."""
        if self.failures.pop(name, None) is not None:
            del self._told[name]
            self.tell(f"{name} works again")
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        rows = {name: [one.since.isoformat(), one.reason] for name, one in self.failures.items()}
        try:
            unfinished = self._file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(rows), encoding="utf-8")
            unfinished.rename(self._file)
        except OSError as error:  # a full disk must not end the supervision
            log.warning("%s cannot be written: %s", self._file, error.strerror)


def read_failures(file: Path) -> dict[str, Failure]:
    """Return the failing tasks of another process by name, empty if its file cannot be read."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return {name: Failure(datetime.fromisoformat(since), reason) for name, (since, reason) in rows.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def describe_failures(failing: dict[str, Failure]) -> list[str]:
    """Return a line for people for each failing task."""
    return [f"failing: {name} since {one.since:%Y-%m-%d %H:%M} UTC: {one.reason}" for name, one in failing.items()]


async def supervise(
    name: str,
    work: Callable[[], Awaitable[None]],
    health: Health,
    every: float | None = None,
    longest_pause: float = LONGEST_PAUSE,
) -> None:
    """Run `work` until it returns or, with `every`, repeatedly with so many seconds between.

    Work that fails is retried after a pause, which doubles up to `longest_pause` seconds. It counts as recovered when it
    returns or, without `every`, has run for STABLE_SECONDS. ConfigError is raised, because only the operator can fix it.
    """
    loop = asyncio.get_running_loop()
    first_pause = pause = min(FIRST_PAUSE, longest_pause)
    while True:
        began, failure = loop.time(), None
        settled = None if every is not None else loop.call_later(STABLE_SECONDS, health.record_recovery, name)
        try:
            await work()
        except ConfigError:
            raise
        except Exception as error:
            failure = error
        finally:
            if settled is not None:
                settled.cancel()
        if failure is None:
            health.record_recovery(name)
            if every is None:
                return
            pause = first_pause
            await asyncio.sleep(every)
        else:
            health.record_failure(name, failure)
            if settled is not None and loop.time() - began >= STABLE_SECONDS:
                pause = first_pause
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest_pause)


@contextlib.asynccontextmanager
async def background_tasks() -> AsyncIterator[Start]:
    """Yield a function that starts tasks in one TaskGroup. They are cancelled at the end; an error of one ends the body."""
    started: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as group:
        try:
            yield lambda work: started.append(group.create_task(work))
        finally:
            for task in started:
                task.cancel()
