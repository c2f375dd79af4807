"""Show an answer from the question to its last edit, and record the opinions on it.

All platforms that edit messages share this; each of them provides an `AnswerView`.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from aiolimiter import AsyncLimiter

from bot.chat.dialogue import ReplyOptions, render_answer
from bot.errors import DatabaseUnavailable, ForgottenError, KibitzError, ServerAsleep, quote_first_line
from bot.logs import working_on
from bot.store.feedback import not_retracted
from bot.store.picks import find_earlier_answer
from bot.types import Feedback, FeedbackKind, Message, Turn, new_id
from connectors.base import Services
from connectors.opinions import Opinions, ReactionSnapshot
from connectors.streaming import GrowingText

log = logging.getLogger(__name__)

BUSY = "I am still busy with what was said here before; please say that again in a moment."
SORRY = "Sorry, I cannot answer now."
NOTED = "Noted, thank you."
TAKEN_BACK = "Taken back."
NOT_ADMITTED = "You may not do that here."
NOT_RECORDED = "Sorry, that is not recorded; please try again in a minute."

PlatformMessage = TypeVar("PlatformMessage")


class AnswerView(Protocol):
    """The messages that show one answer. `turn_id` is set before the turn is stored.

    `asks_for_pick` is set before `show_final`: whether to ask which is better, this answer or the one that it replaces.
    """

    turn_id: str
    asks_for_pick: bool

    async def show_partial(self, text: str) -> None:
        """Show a growing answer, with a way to stop it."""

    async def show_final(self, text: str) -> None:
        """Show the whole final answer, with the buttons."""

    async def apologize(self, text: str = SORRY) -> None:
        """Say that there will be no answer, and why if people should know."""


class Answers:
    """The answers of one platform: those that are growing, and where each is shown."""

    def __init__(self, services: Services, platform: str):
        self.dialogue = services.dialogue
        self.deliveries = services.deliveries
        self.reactions = services.reactions
        self.opinions = Opinions(services.access, platform)
        self.users = services.users
        self.platform = platform
        self._call = services.dialogue.store.database.call
        self._stops: dict[str, asyncio.Event] = {}
        self._stored: dict[str, asyncio.Event] = {}
        self._posts_in_flight: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def find_turn_id(self, message_id: str, channel: str = "") -> str | None:
        """Return the id of the turn that a message shows, or None if the message is not ours.

        People are quick: this waits until messages that are being posted in `channel` are recorded.
        """
        found = await self._call(self.deliveries.find_turn_id, self.platform, message_id)
        if found is None and channel in self._posts_in_flight:
            for posted in list(self._posts_in_flight[channel]):
                await posted.wait()
            found = await self._call(self.deliveries.find_turn_id, self.platform, message_id)
        return found

    @contextlib.asynccontextmanager
    async def posting(self, channel: str) -> AsyncIterator[None]:
        """Hold reactions in a channel while the block sends a message and records its delivery."""
        posted = asyncio.Event()
        self._posts_in_flight[channel].add(posted)
        try:
            yield
        finally:
            posted.set()
            self._posts_in_flight[channel].discard(posted)
            if not self._posts_in_flight[channel]:
                del self._posts_in_flight[channel]

    async def record_delivery(self, channel: str, message_id: str, turn_id: str, part: int) -> None:
        """Record that a message shows a part of a turn."""
        await self._call(self.deliveries.add, self.platform, channel, message_id, turn_id, part)

    async def find_last_turn_id(self, channel: str) -> str | None:
        """Return the id of the newest turn shown in a channel, or None."""
        return await self._call(self.deliveries.find_last_turn_id, self.platform, channel)

    async def needs_answer(self, event_id: str) -> bool:
        """Return whether an event's message was never stored, or its answer never shown. A forgotten message needs none."""
        store = self.dialogue.store
        message = await self._call(store.find_message_of_event, event_id)
        if message is None:
            return True
        turn = await self._call(store.find_answer, message.id)
        if turn is None:
            return not message.is_forgotten
        return not await self._call(self.deliveries.is_shown, self.platform, turn.id)

    def stop(self, turn_id: str) -> None:
        """Stop an answer if it is still growing."""
        if turn_id in self._stops:
            self._stops[turn_id].set()

    async def ask_and_show(
        self, ask: Callable[[ReplyOptions], Awaitable[Turn]], shown: AnswerView, budget: AsyncLimiter
    ) -> None:
        """Ask for an answer and show it while it grows, then in full. Show an earlier answer only if it never was shown."""
        with working_on(turn=shown.turn_id):
            await self._give(ask, shown, budget)

    async def _give(self, ask: Callable[[ReplyOptions], Awaitable[Turn]], shown: AnswerView, budget: AsyncLimiter) -> None:
        turn_id = shown.turn_id
        growing = GrowingText(shown.show_partial, budget)

        async def whole(turn: Turn) -> None:
            await growing.abandon()
            await self._show_final(turn, shown)

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
                await self._show_final(turn, shown)
        except ForgottenError as error:
            log.info("no answer (turn %s): %s", turn_id, error)
        except ServerAsleep as error:
            await self._try_to_apologize(shown, f"{str(error).replace('; ', ': ')}.")
        except KibitzError as error:
            log.warning("no answer (turn %s): %s", turn_id, error)
            await self._try_to_apologize(shown)
        except Exception as error:  # whatever fails: people get an apology, operators the reason in one line
            log.error("no answer (turn %s): %s", turn_id, quote_first_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            await self._try_to_apologize(shown)
        finally:
            del self._stops[turn_id], self._stored[turn_id]

    async def _show_final(self, turn: Turn, shown: AnswerView) -> None:
        if turn.replaces is not None:
            earlier = await self._call(find_earlier_answer, self.dialogue.store, turn.id)
            shown.asks_for_pick = earlier is not None
        await shown.show_final(render_answer(turn))

    async def _try_to_apologize(self, shown: AnswerView, text: str = SORRY) -> None:
        try:
            await shown.apologize(text)
        except Exception as error:  # whatever a platform's client raises: the question may be gone, or the channel closed
            log.warning("an apology could not be shown (turn %s): %s", shown.turn_id, quote_first_line(error))

    async def select_overheard(self, said: Sequence[Message], admits: Callable[[str], bool]) -> list[Message]:
        """Return those of the overheard messages that kibitz may be shown beside one addressed to it.

        They have words, and their authors may take part here (`admits`) and consent to learning.
        """
        spoken = [one for one in said if one.text.strip() and admits(one.author_id)]
        willing = await self._call(self.users.filter_consenting, self.platform, {one.author_id for one in spoken})
        return [one for one in spoken if one.author_id in willing]

    async def record_reaction(self, channel: str, message_id: str, reaction: Feedback, is_admitted: bool = True) -> None:
        """Record a reaction to a message if the message shows one of our turns. `reaction.turn_id` is not set yet.

        People who are not admitted may still take back their reactions: the lists may have changed, and a platform may
        not name the roles of whoever removes a reaction.
        """
        if not (is_admitted or reaction.retracts):
            return
        with self.opinions.take(reaction, message_id) as taken:
            turn_id = await self.find_turn_id(message_id, channel) if taken else None
            if turn_id is not None:
                given = replace(reaction, turn_id=turn_id)
                await (self._commit(given) if is_admitted else self._commit_if_recorded(given))

    async def record_opinion(self, given: Feedback, store: Callable[[], Awaitable[object]] | None = None) -> bool:
        """Record an opinion. Return False if it was dropped. One on a growing answer waits until the turn is stored.

        If it consists of several acts, `given` stands for all of them, and `store` commits them.
        """
        with self.opinions.take(given) as taken:
            return taken and await self._commit(given, store)

    async def _commit(self, given: Feedback, store: Callable[[], Awaitable[object]] | None = None) -> bool:
        await self._wait_until_stored(given.turn_id)
        try:
            await (self.dialogue.record_feedback(given) if store is None else store())
            return True
        except DatabaseUnavailable:
            raise  # not stored, so not acknowledged (law 1)
        except KibitzError as error:
            log.warning("an opinion on turn %s was dropped: %s", given.turn_id, error)
            return False

    async def _commit_if_recorded(self, retraction: Feedback) -> bool:
        """Commit the retraction of a reaction, if that was recorded and not taken back yet."""
        await self._wait_until_stored(retraction.turn_id)
        recorded = self._select_reactions(await self.read_feedback(retraction.turn_id))
        return (retraction.user_id, retraction.signal) in recorded and await self._commit(retraction)

    async def _wait_until_stored(self, turn_id: str) -> None:
        if turn_id in self._stored:
            await self._stored[turn_id].wait()

    async def reconcile_reactions(self, turn_id: str, reading: ReactionSnapshot, admits: Callable[[str], bool]) -> None:
        """Make the recorded reactions to a turn match those that the platform's API showed.

        Add missing reactions of people who may react there (`admits`), except people who were forgotten after the turn was
        shown: they may have reacted before that. Take back reactions that are gone, unless the API listed only some of
        their people. Events that arrive meanwhile are counted once.
        """
        shown_at = await self._call(self.deliveries.find_first_shown_at, self.platform, turn_id)
        if shown_at is None:
            return
        forgotten = await self._call(self.users.find_forgotten_since, self.platform, shown_at)
        said = await self.read_feedback(turn_id)
        # No await until all are claimed: `said` would miss what is recorded meanwhile.
        newer = {(row.user_id, row.signal) for row in said if row.at > reading.read_at}
        recorded = self._select_reactions(said)
        shown = {(user, symbol): message for message, user, symbol in reading.reactions}
        rows = []
        for user, symbol in sorted(shown.keys() - recorded.keys() - newer):
            kind = self.reactions.classify(symbol)
            if kind is None or user in forgotten or not admits(user):
                continue
            if self.opinions.claim([shown[user, symbol]], user, symbol, False, reading.read_at):
                rows.append(Feedback(turn_id, user, kind, symbol, at=reading.read_at))
        for user, symbol in sorted(recorded.keys() - shown.keys() - newer):
            if symbol not in reading.incomplete and self.opinions.claim(
                reading.messages, user, symbol, True, reading.read_at
            ):
                rows.append(Feedback(turn_id, user, recorded[user, symbol], symbol, retracts=True, at=reading.read_at))
        for row in rows:
            await self._commit(row)

    async def retract_reactions(self, turn_id: str, message_id: str, symbol: str | None) -> None:
        """Take back all reactions to a message, or those with the emoji `symbol`, after the platform cleared them."""
        recorded = self._select_reactions(await self.read_feedback(turn_id))
        for (user, given), kind in sorted(recorded.items()):
            if symbol in (None, given):
                self.opinions.expect_new_event((message_id, user, given))
                await self.dialogue.record_feedback(Feedback(turn_id, user, kind, given, retracts=True))

    async def read_feedback(self, turn_id: str) -> list[Feedback]:
        """Return all feedback on a turn, oldest first."""
        return (await self._call(self.dialogue.store.read_feedback_on, [turn_id])).get(turn_id, [])

    def _select_reactions(self, said: list[Feedback]) -> dict[tuple[str, str], FeedbackKind]:
        """Return the reactions that were not taken back: (user, emoji) -> the kind of opinion."""
        return {
            (row.user_id, row.signal): row.kind
            for row in not_retracted(said)
            if self.reactions.classify(row.signal) == row.kind
        }


async def catch_up_on_messages(
    said: Sequence[PlatformMessage],
    take: Callable[[PlatformMessage], Awaitable[bool]],
    answer: Callable[[PlatformMessage], Awaitable[None]],
    edit: Callable[[PlatformMessage], Awaitable[None]],
) -> None:
    """Queue answers to the messages of `said` (oldest first) that were missed; update the others if they were edited.

    `take` decides whether a message gets an answer, within people's limits; `answer` queues it.
    """
    missed = []
    for message in reversed(said):  # newest first: if they are too many, people still wait for these
        with working_on(request=new_id()):
            if await take(message):
                missed.append(message)
            else:
                await edit(message)
    for message in reversed(missed):
        with working_on(request=new_id()):
            await answer(message)
