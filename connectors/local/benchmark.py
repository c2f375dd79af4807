"""Measure the time that the connectors add to vLLM's own, over a local server of each platform.

In many conversations at once people write, wait for the whole answer, sometimes react, and write again. "Added" is the time
from the event to the text that people see, less the time from kibitz's request to vLLM to the same text from vLLM.

Each number of conversations is measured twice: with people who think about `think` seconds before they write, and at full
load, with people who write again at once. At full load a latency says how long the machine's queue is.

Run: ``kibitz bench connectors``.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bot.chat.dialogue import DialogueManager
from bot.types import FeedbackKind, Progress, Reply, Turn
from bot.wording import count_noun

TEXTS = ["hello", "i can't sleep", "good night", "tell me a joke", "what should i eat", "how are you"]
MESSAGES_PER_CONVERSATION = 8  # messages in one conversation
CONVERSATIONS = (1, 16, 64)
ROUNDS = 48  # messages in one conversation with people who think, at most


class TimedAnswer(Protocol):
    """An answer as people see it; times are monotonic, in seconds."""

    id: str
    question: str
    first_at: float
    final_at: float
    is_whole: bool
    edits: int


class Platform(Protocol):
    """One platform, as `connectors.local.platforms` drives it."""

    name: str

    @property
    def met_429(self) -> int:
        """How often the platform answered 429 (too many requests)."""

    async def start(self) -> None:
        """Start the platform, and the connector on it."""

    async def stop(self) -> None:
        """Stop both."""

    def place(self, direct: bool = False) -> str:
        """Return a new channel, or a new direct message."""

    async def say(self, place: str, user: str, text: str) -> str:
        """Write to the bot as a person. Return the question's id."""

    def answers(self, place: str) -> Sequence[Any]:
        """Return the answers in a place, oldest first."""

    async def wait_for_change(self, place: str) -> None:
        """Wait until an answer in a place changes."""

    async def find_turn_id(self, answer: Any) -> str:
        """Return the id of the turn that an answer shows."""

    async def react(self, user: str, answer: Any, likes: bool) -> None:
        """Add 👍 or 👎 as a person."""


@dataclass(frozen=True)
class ReplyTimes:
    """The times of one answer of vLLM: the request, the first text, the last text (monotonic, s)."""

    asked_at: float
    first_at: float
    final_at: float


@dataclass(frozen=True)
class Exchange:
    """One question with the answer that people saw."""

    place: str
    said_at: float
    answer: Any


@asynccontextmanager
async def recording_replies(dialogue: DialogueManager) -> AsyncIterator[dict[float, ReplyTimes]]:
    """Yield a dict of the answers that vLLM gives in the block, by latency in ms (which no two answers share)."""
    found: dict[float, ReplyTimes] = {}
    ask = dialogue.policy.reply

    async def timed(*prompt: Any, on_text: Any = None, **options: Any) -> Reply:
        asked, first = time.monotonic(), 0.0

        def heard(text: str) -> Any:
            nonlocal first
            first = first or time.monotonic()
            return None if on_text is None else on_text(text)

        reply = await ask(*prompt, on_text=heard, **options)
        found[reply.latency_ms] = ReplyTimes(asked, first or time.monotonic(), time.monotonic())
        return reply

    dialogue.policy.reply = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        dialogue.policy.reply = ask  # type: ignore[method-assign]


@dataclass
class Round:
    """The outcome for one number of conversations."""

    exchanges: list[Exchange] = field(default_factory=list)
    reactions: int = 0
    lost: int = 0
    seconds: float = 0.0


async def measure(
    dialogue: DialogueManager, platform: Platform, messages: int, think: float, seed: int, progress: Progress
) -> dict[str, float]:
    """Measure one platform with `messages` for each number of conversations at each pace, after 32 to warm up."""
    name = platform.name
    figures: dict[str, float] = {}
    totals = dict.fromkeys((f"{name}_lost", f"{name}_doubled", f"{name}_reactions_sent", f"{name}_reactions_stored"), 0)
    await platform.start()
    try:
        async with recording_replies(dialogue) as from_vllm:
            await _converse(platform, 16, 32, random.Random(seed), progress, 0.0)
            for count, (pace, seconds) in itertools.product(CONVERSATIONS, (("full_", 0.0), ("", think))):
                met, most = platform.met_429, min(messages, ROUNDS * count) if seconds else messages
                rng = random.Random(f"{seed} {count} {pace}")
                found = await _converse(platform, count, most, rng, progress, seconds)
                turns = [await _find_turn(dialogue, platform, one) for one in found.exchanges]
                for kind, values in _compute_added(found.exchanges, turns, from_vllm).items():
                    for percent in (50, 99):
                        figures[f"{name}_{pace}{kind}_p{percent}_ms_{count}"] = 1000 * float(np.percentile(values, percent))
                totals[f"{name}_lost"] += found.lost
                totals[f"{name}_doubled"] += _count_doubled(platform, found.exchanges)
                totals[f"{name}_reactions_sent"] += found.reactions
                totals[f"{name}_reactions_stored"] += await _count_stored(dialogue, turns, found.reactions)
                if not seconds:
                    figures[f"{name}_messages_per_s_{count}"] = len(found.exchanges) / found.seconds
                    figures[f"{name}_edits_{count}"] = sum(one.answer.edits for one in found.exchanges)
                    figures[f"{name}_met_429_{count}"] = platform.met_429 - met
    finally:
        await platform.stop()
    return figures | totals


async def wait_for_answers(platform: Platform, place: str, count: int) -> Sequence[Any]:
    """Return the answers in a place as soon as `count` of them are whole. Raises TimeoutError after 5 minutes."""
    async with asyncio.timeout(300):
        while sum(one.is_whole for one in platform.answers(place)) < count:
            await platform.wait_for_change(place)
    return platform.answers(place)


async def _converse(
    platform: Platform, count: int, messages: int, rng: random.Random, progress: Progress, think: float
) -> Round:
    """Ask `messages` questions in `count` places at once. People think about `think` seconds before each."""
    found = Round()
    thoughts = [rng.uniform(0, 2 * think) for _ in range(messages)]
    label = f"{platform.name}, {count_noun(count, 'conversation')}"

    async def talk(number: int, lines: list[tuple[str, bool | None]]) -> None:
        user = f"user{number}"
        for index, (text, likes) in enumerate(lines):
            position = index % MESSAGES_PER_CONVERSATION + 1
            if position == 1:
                place = platform.place()
            await asyncio.sleep(thoughts[number + index * count])
            said = time.monotonic()
            await platform.say(place, user, text)
            try:
                answer = (await wait_for_answers(platform, place, position))[-1]
            except TimeoutError:
                found.lost += len(lines) - index
                return
            found.exchanges.append(Exchange(place, said, answer))
            if likes is not None:
                found.reactions += 1
                await platform.react(user, answer, likes)
            progress(label, len(found.exchanges), messages)

    lines = [(rng.choice(TEXTS), rng.choice([True, False, None])) for _ in range(messages)]
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(talk(number, lines[number::count]))
    found.seconds = time.monotonic() - began
    return found


async def _find_turn(dialogue: DialogueManager, platform: Platform, exchange: Exchange) -> Turn | None:
    turn_id = await platform.find_turn_id(exchange.answer)
    return await dialogue.store.database.call(dialogue.store.find_turn, turn_id)


def _compute_added(
    exchanges: Sequence[Exchange], turns: Sequence[Turn | None], from_vllm: dict[float, ReplyTimes]
) -> dict[str, list[float]]:
    """Return the time added to each answer's first text and to its last (s)."""
    added: dict[str, list[float]] = {"first_added": [], "added": []}
    for exchange, turn in zip(exchanges, turns, strict=True):
        if turn is not None and turn.latency_ms in from_vllm:
            took = from_vllm[turn.latency_ms]
            added["first_added"].append(exchange.answer.first_at - exchange.said_at - (took.first_at - took.asked_at))
            added["added"].append(exchange.answer.final_at - exchange.said_at - (took.final_at - took.asked_at))
    return added


def _count_doubled(platform: Platform, exchanges: Sequence[Exchange]) -> int:
    """Return the number of answers beyond one for each question."""
    places = {exchange.place for exchange in exchanges}
    return sum(len(platform.answers(place)) for place in places) - len(exchanges)


async def _count_stored(dialogue: DialogueManager, turns: Sequence[Turn | None], expected: int) -> int:
    """Return how many reactions are in the database, waiting up to 5 s for `expected` of them."""
    store = dialogue.store
    ids = [turn.id for turn in turns if turn is not None]
    found = 0
    for _ in range(50):
        said = await store.database.call(store.read_feedback_on, ids)
        kinds = (FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL)
        found = sum(row.kind in kinds for rows in said.values() for row in rows)
        if found >= expected:
            break
        await asyncio.sleep(0.1)
    return found
