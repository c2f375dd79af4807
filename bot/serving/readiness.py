"""Readiness: whether kibitz can answer now, and if not, why.

vLLM, the database and the disk are looked at every few seconds in the background, so that whoever asks costs nothing and
waits for nothing. It knows no connector.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import sqlalchemy as sa

from bot.data_directory import check_writable
from bot.errors import ConfigError, DatabaseUnavailable, cause_of
from bot.serving.policy import Policy
from bot.store.database import Database
from bot.store.tables import conversations

Look = Callable[[], Awaitable[str | None]]  # what is wrong, or None

PAUSE_SECONDS = 2.0  # between two looks
LOOK_SECONDS = 7.0  # one look, at most: so the last one is never older than
OLDEST_SECONDS = 10.0


class Readiness:
    """What the last look found."""

    def __init__(self, looks: Mapping[str, Look]):
        """`looks` are by the name of what they look at."""
        self._looks = looks
        self._faults: list[str] = []
        self._at = float("-inf")

    def faults(self) -> list[str]:
        """Return what is wrong, each in one line, as the last look found it; also where that was too long ago."""
        if time.monotonic() - self._at > OLDEST_SECONDS:
            return [f"kibitz has not looked after itself for {OLDEST_SECONDS:g} s"]
        return self._faults

    async def look(self) -> None:
        """Look at everything now, for LOOK_SECONDS at most."""
        found = await asyncio.gather(*(_within_time(name, look) for name, look in self._looks.items()))
        self._faults, self._at = [fault for fault in found if fault is not None], time.monotonic()

    async def watch(self) -> None:
        """Look again and again, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(PAUSE_SECONDS)


def looks_at(policy: Policy, database: Database, data: Path) -> dict[str, Look]:
    """Return the looks at vLLM, at the database, and at the disk that holds the data directory."""

    async def vllm() -> str | None:
        if policy.is_asleep:
            return "vLLM sleeps while a version is trained"
        return None if await policy.admin.ready(LOOK_SECONDS) else "vLLM generates nothing"

    async def database_() -> str | None:
        try:
            await database.call(_begin, database)
        except DatabaseUnavailable as error:
            return str(error)
        except sa.exc.SQLAlchemyError as error:
            return f"the database fails ({cause_of(error)})"
        return None

    async def disk() -> str | None:
        try:
            await asyncio.to_thread(check_writable, data)
        except ConfigError as error:
            return str(error)
        return None

    return {"vLLM": vllm, "the database": database_, "the disk": disk}


def _begin(database: Database) -> None:
    """Take the right to write, read something, and write nothing."""
    with database.begin() as connection:
        connection.execute(sa.select(conversations.c.id).limit(1)).first()


async def _within_time(name: str, look: Look) -> str | None:
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await look()
    except TimeoutError:
        return f"{name} did not answer within {LOOK_SECONDS:g} s"
