"""The protocol of a connector, the services that connectors share, and the lanes that handle their events in order."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.environment import listen
from bot.logs import keep_ids
from bot.store.deliveries import Deliveries
from bot.store.users import Users
from connectors.access import Access

log = logging.getLogger(__name__)

Work = Callable[[], Awaitable[None]]


class Connector(Protocol):
    """One platform: its events become messages and feedback, and answers go back."""

    name: str

    async def run(self) -> None:
        """Serve until cancelled, reconnecting as needed. Raises ConnectorError if only the operator can help."""

    async def stop(self) -> None:
        """Accept nothing new, finish or mark what is in flight, and close."""


@dataclass(frozen=True)
class Desk:
    """The functions behind questions and commands about kibitz itself. They return texts to show."""

    explain_turn: Callable[[str], Awaitable[str]]  # turn id -> what made the turn, and what its feedback led to
    describe_status: Callable[[], Awaitable[str]]
    roll_back: Callable[[], Awaitable[str]]
    pause_learning: Callable[[], Awaitable[str]]
    manage_consent: Callable[[str, str, str], Awaitable[str]]  # platform, user, choice (status, on, off)
    forget_person: Callable[[str, str], Awaitable[str]]  # platform, user
    find_faults: Callable[[], list[str]]  # what keeps kibitz from answering, as last seen
    list_failing_tasks: Callable[[], list[str]]  # names of the tasks that fail now


@dataclass(frozen=True)
class Services:
    """The objects that all connectors share. `bot.app` makes them once."""

    dialogue: DialogueManager
    deliveries: Deliveries
    reactions: Reactions
    access: Access
    users: Users
    desk: Desk


async def sleep_unless_stopped(stopping: asyncio.Event, seconds: float) -> None:
    """Wait `seconds`, or until `stopping` is set."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)


def open_listener(section: str, host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises ConfigError, naming the keys of `section`, if the address is not available."""
    found = listen(f"{section}.port", host, port, otherwise=f", or turn [{section}] off")
    # asyncio does this only for sockets that it makes itself; without it each piece of a stream waits 40 ms for an ACK.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


class Lanes:
    """One queue and one worker for each conversation, which handle its events in order of arrival.

    `put` never waits: call it before the first await of an event's handler, while events are still in order. A lane holds
    at most `depth` pieces of work, all lanes together `total`; more is refused. Work logs with the ids of its event.
    """

    def __init__(self, depth: int = 8, total: int = 1024):
        self.depth, self.total = depth, total
        self._queues: dict[str, asyncio.Queue[Work]] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._waiting = 0
        self._open = True
        self._freed = asyncio.Event()

    def put(self, key: str, work: Work) -> bool:
        """Queue work in the lane `key`. Return False if the lane or the total is full, or the lanes are closed."""
        queue = self._queues.get(key) or asyncio.Queue(self.depth)
        if not self._open or self._waiting >= self.total or queue.full():
            return False
        self._waiting += 1
        queue.put_nowait(keep_ids(partial(self._do, key, work)))
        if key not in self._workers:
            self._queues[key] = queue
            self._workers[key] = asyncio.create_task(self._work_off(key, queue))
        return True

    async def put_patiently(self, key: str, work: Work) -> bool:
        """Queue work as soon as it fits. Return False if the lanes are closed."""
        while self._open:
            if self.put(key, work):
                return True
            self._freed.clear()
            await self._freed.wait()
        return False

    async def close(self, seconds: float) -> None:
        """Refuse new work, give running work `seconds` to end, and cancel the rest."""
        self._open = False
        self._freed.set()
        workers = list(self._workers.values())
        if workers:
            _, late = await asyncio.wait(workers, timeout=seconds)
            for worker in late:
                worker.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _do(self, key: str, work: Work) -> None:
        try:
            await work()
        except Exception:  # one event that fails must not end its conversation
            log.exception("an event in %s failed", key)
        finally:
            self._freed.set()

    async def _work_off(self, key: str, queue: asyncio.Queue[Work]) -> None:
        try:
            with contextlib.suppress(asyncio.QueueEmpty):
                while True:
                    work = queue.get_nowait()
                    self._waiting -= 1
                    await work()
        finally:  # no await since the queue was empty: nothing was put in between
            self._waiting -= queue.qsize()
            del self._queues[key], self._workers[key]
