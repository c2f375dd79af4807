"""Answers: one answer from the question to its last edit, and the opinions that arrive while it grows and later.

What is the same on every platform that edits messages. It knows no platform: what shows an answer is given.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from aiolimiter import AsyncLimiter

from bot.dialogue import ReplyOptions, spoken
from bot.errors import Asleep, DatabaseUnavailable, KibitzError
from bot.feedback import held
from bot.types import Feedback, FeedbackKind, Turn
from connectors.base import Shared
from connectors.opinions import Opinions, Reaction
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

    async def sorry(self, text: str = SORRY) -> None:
        """Say that there will be no answer, and why where people should know."""


class Answers:
    """The answers of one platform: those that are growing now, and where each is shown."""

    def __init__(self, shared: Shared, platform: str):
        self.dialogue = shared.dialogue
        self.deliveries = shared.deliveries
        self.reactions = shared.reactions
        self.opinions = Opinions(shared.access, platform)
        self.users = shared.users
        self.platform = platform
        self._call = shared.dialogue.store.database.call
        self._stops: dict[str, asyncio.Event] = {}
        self._stored: dict[str, asyncio.Event] = {}
        self._posting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def turn_of(self, message_id: str, channel: str = "") -> str | None:
        """The turn that a message shows; None where the message is not ours.

        People are quick: what is being posted in the `channel` at this moment is in the ledger before this returns.
        """
        found = await self._call(self.deliveries.turn_of, self.platform, message_id)
        if found is None and channel in self._posting:
            for posted in list(self._posting[channel]):
                await posted.wait()
            found = await self._call(self.deliveries.turn_of, self.platform, message_id)
        return found

    @contextlib.asynccontextmanager
    async def posting(self, channel: str) -> AsyncIterator[None]:
        """Around the sending of a message and its `deliver`: opinions on it wait until the ledger has it."""
        posted = asyncio.Event()
        self._posting[channel].add(posted)
        try:
            yield
        finally:
            posted.set()
            self._posting[channel].discard(posted)
            if not self._posting[channel]:
                del self._posting[channel]

    async def deliver(self, channel: str, message_id: str, turn_id: str, part: int) -> None:
        """Record that a message shows a part of a turn."""
        await self._call(self.deliveries.add, self.platform, channel, message_id, turn_id, part)

    async def last_turn(self, channel: str) -> str | None:
        """The newest turn that was shown in a channel."""
        return await self._call(self.deliveries.last_turn, self.platform, channel)

    async def needs_answer(self, event_id: str) -> bool:
        """Whether the message of an event was never heard, or its answer never shown. A forgotten one needs none."""
        store = self.dialogue.store
        message = await self._call(store.message_of_event, event_id)
        if message is None:
            return True
        turn = await self._call(store.turn_answering, message.id)
        if turn is None:
            return not message.is_forgotten
        return not await self._call(self.deliveries.is_shown, self.platform, turn.id)

    def stop(self, turn_id: str) -> None:
        """End an answer where it is, if it still grows."""
        if turn_id in self._stops:
            self._stops[turn_id].set()

    async def give(self, ask: Callable[[ReplyOptions], Awaitable[Turn]], shown: Shown, budget: AsyncLimiter) -> None:
        """Ask, show the answer while it grows, then whole. One that was given before is shown if it never was."""
        turn_id = shown.turn_id
        growing = GrowingText(shown.grow, budget)

        async def whole(turn: Turn) -> None:
            await growing.abandon()
            await shown.whole(spoken(turn))

        stop = self._stops[turn_id] = asyncio.Event()
        stored = self._stored[turn_id] = asyncio.Event()
        try:
            try:
                turn = await ask(ReplyOptions(growing.add, whole, stop, turn_id))
            finally:
                stored.set()
                await growing.abandon()
            if turn.id != turn_id and not await self._call(self.deliveries.is_shown, self.platform, turn.id):
                shown.turn_id = turn.id
                await shown.whole(spoken(turn))
        except Asleep as error:
            await shown.sorry(f"{str(error).replace('; ', ': ')}.")
        except KibitzError as error:
            log.warning("no answer: %s", error)
            await shown.sorry()
        finally:
            del self._stops[turn_id], self._stored[turn_id]

    async def reacted(self, channel: str, message_id: str, reaction: Feedback) -> None:
        """Commit a reaction on a message, if it shows a turn of ours (which `reaction` does not name yet)."""
        with self.opinions.take(reaction, message_id) as taken:
            turn_id = await self.turn_of(message_id, channel) if taken else None
            if turn_id is not None:
                await self._commit(replace(reaction, turn_id=turn_id))

    async def record(self, given: Feedback) -> None:
        """Commit an opinion; one on an answer that still grows waits for its turn."""
        with self.opinions.take(given) as taken:
            if taken:
                await self._commit(given)

    async def _commit(self, given: Feedback) -> None:
        if given.turn_id in self._stored:
            await self._stored[given.turn_id].wait()
        try:
            await self.dialogue.record_feedback(given)
        except DatabaseUnavailable:
            raise  # it is not stored, and so not acknowledged (law 1)
        except KibitzError as error:
            log.warning("an opinion was dropped: %s", error)

    async def reconcile(self, turn_id: str, messages: Collection[str], there: set[Reaction], read_at: datetime) -> None:
        """Make the recorded reactions on a turn those that its `messages` had at `read_at`, when the platform was read.

        Add what is missing and take back what is gone. Events that arrive meanwhile are counted once. People who were
        forgotten are left out.
        """
        forgotten = await self._call(self.users.forgotten, self.platform)
        said = await self._said_of(turn_id)
        # No await from here until all are claimed: of what comes later nothing is missing in `said`.
        newer = {(row.user_id, row.signal) for row in said if row.at > read_at}
        recorded = self._reactions_among(said)
        shown = {(user, symbol): message for message, user, symbol in there}
        rows = []
        for user, symbol in sorted(shown.keys() - recorded.keys() - newer):
            kind = self.reactions.kind(symbol)
            if kind is None or user in forgotten:
                continue
            if self.opinions.claim([shown[user, symbol]], user, symbol, False, read_at):
                rows.append(Feedback(turn_id, user, kind, symbol, at=read_at))
        for user, symbol in sorted(recorded.keys() - shown.keys() - newer):
            if self.opinions.claim(messages, user, symbol, True, read_at):
                rows.append(Feedback(turn_id, user, recorded[user, symbol], symbol, retracts=True, at=read_at))
        for row in rows:
            await self._commit(row)

    async def cleared(self, turn_id: str, message_id: str, symbol: str | None) -> None:
        """All reactions on a message are gone, or all with one emoji: every one of them is taken back."""
        recorded = self._reactions_among(await self._said_of(turn_id))
        for (user, given), kind in sorted(recorded.items()):
            if symbol in (None, given):
                self.opinions.forget((message_id, user, given))
                await self.dialogue.record_feedback(Feedback(turn_id, user, kind, given, retracts=True))

    async def _said_of(self, turn_id: str) -> list[Feedback]:
        return (await self._call(self.dialogue.store.feedback_of, [turn_id])).get(turn_id, [])

    def _reactions_among(self, said: list[Feedback]) -> dict[tuple[str, str], FeedbackKind]:
        """The reactions that are recorded and were not taken back: who gave which emoji, and the opinion that it is."""
        return {(row.user_id, row.signal): row.kind for row in held(said) if self.reactions.kind(row.signal) == row.kind}
