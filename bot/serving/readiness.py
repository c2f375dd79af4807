"""Readiness: whether kibitz can answer now, and if not, why.

vLLM, the database and the disk are looked at every few seconds in the background, so that whoever asks costs nothing and
waits for nothing. It knows no connector.
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

Check = Callable[[], Awaitable[str | None]]  # what is wrong, or None

PAUSE_SECONDS = 2.0  # between two looks
CHECK_SECONDS = 7.0  # one look, at most: so the last one is never older than
MAX_AGE_SECONDS = 10.0


class Readiness:
    """What the last look found."""

    def __init__(self, looks: Mapping[str, Check]):
        """`looks` are by the name of what they look at."""
        self._checks = looks
        self._faults: list[str] = []
        self._at = float("-inf")

    def list_faults(self) -> list[str]:
        """Return what is wrong, each in one line, as the last look found it; also where that was too long ago."""
        if time.monotonic() - self._at > MAX_AGE_SECONDS:
            return [f"kibitz has not looked after itself for {MAX_AGE_SECONDS:g} s"]
        return self._faults

    async def check(self) -> None:
        """Check at everything now, for LOOK_SECONDS at most."""
        found = await asyncio.gather(*(_check_in_time(name, look) for name, look in self._checks.items()))
        self._faults, self._at = [fault for fault in found if fault is not None], time.monotonic()

    async def watch(self) -> None:
        """Check again and again, for ever."""
        while True:
            await self.check()
            await asyncio.sleep(PAUSE_SECONDS)


def make_checks(policy: Policy, database: Database, data: Path) -> dict[str, Check]:
    """Return the looks at vLLM, at the database, and at the disk that holds the data directory."""

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
    """Take the right to write, read something, and write nothing."""
    with database.begin() as connection:
        connection.execute(sa.select(conversations.c.id).limit(1)).first()


async def _check_in_time(name: str, look: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            return await look()
    except TimeoutError:
        return f"{name} did not answer within {CHECK_SECONDS:g} s"
