"""Answers: one answer from the question to its last edit, and the opinions that arrive while it grows.

What is the same on every platform that edits messages. It knows no platform: what shows an answer is given.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from aiolimiter import AsyncLimiter

from bot.deliveries import Deliveries
from bot.dialogue import DialogueManager, ReplyOptions
from bot.errors import KibitzError, ServingError
from bot.types import Feedback, Turn
from connectors.streaming import GrowingText

log = logging.getLogger(__name__)

BUSY = "I am still busy with what was said here before; please say that again in a moment."
SORRY = "Sorry, I cannot answer now."


class Shown(Protocol):
    """The messages that show one answer. `turn_id` is known before the turn is stored."""

    turn_id: str

    async def grow(self, text: str) -> None:
        """Show a growing answer, with a way to stop it."""

    async def whole(self, text: str) -> None:
        """Show the final answer, all of it, with the buttons."""

    async def sorry(self) -> None:
        """Say that there will be no answer."""


class Answers:
    """The answers of one platform: those that are growing now, and where each is shown."""

    def __init__(self, dialogue: DialogueManager, deliveries: Deliveries, platform: str):
        self.dialogue = dialogue
        self.deliveries = deliveries
        self.platform = platform
        self._call = dialogue.store.database.call
        self._stops: dict[str, asyncio.Event] = {}
        self._stored: dict[str, asyncio.Event] = {}

    async def turn_of(self, message_id: str) -> str | None:
        """The turn that a message shows; None where the message is not ours."""
        return await self._call(self.deliveries.turn_of, self.platform, message_id)

    async def last_turn(self, channel: str) -> str | None:
        """The newest turn that was shown in a channel."""
        return await self._call(self.deliveries.last_turn, self.platform, channel)

    async def is_shown(self, turn_id: str) -> bool:
        """Whether any message shows a turn."""
        return await self._call(self.deliveries.is_shown, self.platform, turn_id)

    async def deliver(self, channel: str, message_id: str, turn_id: str, part: int) -> None:
        """Record that a message shows a part of a turn."""
        await self._call(self.deliveries.add, self.platform, channel, message_id, turn_id, part)

    def stop(self, turn_id: str) -> None:
        """End an answer where it is, if it still grows."""
        if turn_id in self._stops:
            self._stops[turn_id].set()

    async def give(self, ask: Callable[[ReplyOptions], Awaitable[Turn]], shown: Shown, budget: AsyncLimiter) -> None:
        """Ask, show the answer while it grows, then whole. One that was given before is shown if it never was."""
        turn_id = shown.turn_id
        growing = GrowingText(shown.grow, budget)
        stop = self._stops[turn_id] = asyncio.Event()
        stored = self._stored[turn_id] = asyncio.Event()
        try:
            try:
                turn = await ask(ReplyOptions(growing.add, stop, turn_id))
            finally:
                stored.set()
                await growing.abandon()
            shown.turn_id = turn.id
            if turn.id == turn_id or not await self.is_shown(turn.id):
                await shown.whole(turn.text)
        except ServingError as error:
            log.warning("no answer: %s", error)
            await shown.sorry()
        finally:
            del self._stops[turn_id], self._stored[turn_id]

    async def record(self, given: Feedback) -> None:
        """Commit an opinion; one on an answer that still grows waits for its turn."""
        if given.turn_id in self._stored:
            await self._stored[given.turn_id].wait()
        try:
            await self.dialogue.record_feedback(given)
        except KibitzError as error:
            log.warning("an opinion was dropped: %s", error)
