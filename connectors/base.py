"""What all connectors share: the protocol that they keep, and the lanes in which their events are worked off.

It knows no platform and no policy.
"""

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
    """One platform: its events become messages and feedback, answers go back."""

    name: str

    async def run(self) -> None:
        """Serve until cancelled; reconnects by itself. Raises ConnectorError where only the operator can help."""

    async def stop(self) -> None:
        """Take nothing new in, finish or mark what is in flight, and close."""


@dataclass(frozen=True)
class Desk:
    """Where people ask about kibitz itself; each answer is a text to show."""

    explain_turn: Callable[[str], Awaitable[str]]  # what made a turn, by its id, and what came of what was said about it
    describe_status: Callable[[], Awaitable[str]]
    roll_back: Callable[[], Awaitable[str]]
    pause_learning: Callable[[], Awaitable[str]]
    manage_consent: Callable[[str, str, str], Awaitable[str]]  # platform, user, and status, on or off
    forget_person: Callable[[str, str], Awaitable[str]]  # platform, user
    find_faults: Callable[[], list[str]]  # what keeps kibitz from answering now, as it was last seen
    list_failing_tasks: Callable[[], list[str]]  # the names of the tasks that fail now


@dataclass(frozen=True)
class Services:
    """What the chat platforms share: made once, by the composition root."""

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
    """The socket of a server. Raises ConfigError that names the keys of `section` where the address cannot be had."""
    found = listen(f"{section}.port", host, port, otherwise=f", or turn [{section}] off")
    # asyncio does this only for sockets that it makes itself; without it each piece of a stream waits 40 ms for an ACK.
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


class Lanes:
    """One queue and one worker for each conversation, so that what arrived first is done first.

    `put` never waits: it is called before the first await of an event's handler, while events are still in order. A lane
    holds at most `depth` pieces of work, all lanes together `total`; what does not fit is refused. Each
    piece of work logs with the ids of the event that put it there.
    """

    def __init__(self, depth: int = 8, total: int = 1024):
        self.depth, self.total = depth, total
        self._queues: dict[str, asyncio.Queue[Work]] = {}
        self._workers: dict[str, asyncio.Task[None]] = {}
        self._waiting = 0
        self._open = True
        self._freed = asyncio.Event()

    def put(self, key: str, work: Work) -> bool:
        """Queue a piece of work in the lane `key`; False where the lane, or everything, is full or closed."""
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
        """Queue a piece of work as soon as it fits; False where the lanes are closed."""
        while self._open:
            if self.put(key, work):
                return True
            self._freed.clear()
            await self._freed.wait()
        return False

    async def close(self, seconds: float) -> None:
        """Refuse new work, give what is under way `seconds` to end, and cancel the rest."""
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
        finally:  # no await since the queue was found empty: nothing can have been put in between
            self._waiting -= queue.qsize()
            del self._queues[key], self._workers[key]
