"""Show a growing answer by edits, as often as its channel may be edited.

The first text is shown at once, later text at even steps: a burst of edits at the beginning would only make people wait
for the rest. Only the newest text is sent, with one edit in flight at a time, and the final text is always sent.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from aiolimiter import AsyncLimiter

log = logging.getLogger(__name__)


class Budgets:
    """Limits of `edits` in `seconds` for each channel, shared by all answers in it."""

    def __init__(self, edits: float, seconds: float, channels: int = 4096):
        self.edits, self.seconds, self.channels = edits, seconds, channels
        self._limiters: OrderedDict[str, AsyncLimiter] = OrderedDict()

    def get_limiter(self, channel: str) -> AsyncLimiter:
        """Return the limiter of a channel. Beyond `channels` of them, the least recently used are dropped."""
        limiter = self._limiters.pop(channel, None) or AsyncLimiter(self.edits, self.seconds)
        self._limiters[channel] = limiter
        while len(self._limiters) > self.channels:
            self._limiters.popitem(last=False)
        return limiter


class GrowingText:
    """A growing text whose newest state `show` displays.

    A failed edit is logged, and the next one includes its text. A failed final edit is raised.
    """

    def __init__(self, show: Callable[[str], Awaitable[None]], budget: AsyncLimiter):
        self.text = ""
        self.edits = 0
        self._show = show
        self._budget = budget
        self._grown = asyncio.Event()
        self._in_flight = asyncio.Lock()
        self._task = asyncio.create_task(self._run())

    def add(self, piece: str) -> None:
        """Append a piece, to be shown when the budget allows. Never waits."""
        self.text += piece
        self._grown.set()

    async def finish(self, text: str) -> None:
        """Show the final text after the edit in flight, without waiting for the budget."""
        await self.abandon()
        await self._show(text)
        self.edits += 1

    async def abandon(self) -> None:
        """Stop showing. Return when no edit is in flight."""
        async with self._in_flight:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._grown.wait()
            await self._budget.acquire()
            async with self._in_flight:
                self._grown.clear()
                try:
                    await self._show(self.text)
                    self.edits += 1
                except Exception as error:  # whatever a platform's client raises
                    log.warning("an edit of a growing answer failed (%s); the next one includes its text", error)
            await asyncio.sleep(self._budget.time_period / self._budget.max_rate)
