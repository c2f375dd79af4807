"""Readiness: tells whether kibitz can answer now, and if not, why.

It checks vLLM, the database and the disk every few seconds in the background, so that a question about it is cheap and
answered at once.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import sqlalchemy as sa

from bot.data_directory import check_directory_writable
from bot.errors import ConfigError, DatabaseUnavailable, quote_error
from bot.serving.policy import Policy
from bot.store.database import Database
from bot.store.tables import conversations

Check = Callable[[], Awaitable[str | None]]  # returns a fault, or None

PAUSE_SECONDS = 2.0  # between two checks
CHECK_SECONDS = 7.0  # the longest time of a check
MAX_AGE_SECONDS = 10.0  # more than both together: older results mean that the watch has stopped


class Readiness:
    """The faults that the last check found."""

    def __init__(self, looks: Mapping[str, Check]):
        """`looks` are the checks, by the name of the part that they check."""
        self._checks = looks
        self._faults: list[str] = []
        self._at = float("-inf")

    def list_faults(self) -> list[str]:
        """Return the faults of the last check, one line each. A check that is too old is a fault too."""
        if time.monotonic() - self._at > MAX_AGE_SECONDS:
            return [f"kibitz has not checked itself for {MAX_AGE_SECONDS:g} s"]
        return self._faults

    async def check(self) -> None:
        """Check everything now, within CHECK_SECONDS."""
        found = await asyncio.gather(*(_check_in_time(name, look) for name, look in self._checks.items()))
        self._faults, self._at = [fault for fault in found if fault is not None], time.monotonic()

    async def watch(self) -> None:
        """Check every PAUSE_SECONDS, for ever."""
        while True:
            await self.check()
            await asyncio.sleep(PAUSE_SECONDS)


def make_checks(policy: Policy, database: Database, data: Path) -> dict[str, Check]:
    """Return the checks of vLLM, of the database, and of the disk that holds the data directory."""

    async def vllm() -> str | None:
        if policy.is_asleep:
            return "vLLM sleeps while a version is trained"
        return None if await policy.admin.is_ready(CHECK_SECONDS) else "vLLM generates nothing"

    async def database_() -> str | None:
        try:
            await database.call(_try_writing, database)
        except DatabaseUnavailable as error:
            return str(error)
        except sa.exc.SQLAlchemyError as error:
            return f"the database fails ({quote_error(error)})"
        return None

    async def disk() -> str | None:
        try:
            await asyncio.to_thread(check_directory_writable, data)
        except ConfigError as error:
            return str(error)
        return None

    return {"vLLM": vllm, "the database": database_, "the disk": disk}


def _try_writing(database: Database) -> None:
    """Begin a transaction that may write, and only read in it."""
    with database.begin() as connection:
        connection.execute(sa.select(conversations.c.id).limit(1)).first()


async def _check_in_time(name: str, look: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await look()
    except TimeoutError:
        return f"{name} did not answer within {CHECK_SECONDS:g} s"
