"""Benchmark of the tracker: measure the cost of recall with a thousand to a million stored messages.

Each conversation is one mention, a question and its answer, as on platforms. Vectors are random directions, which cost as
much as real ones. Two things are measured:

- The time that recall adds to a message. The messages are spread over channels of a hundred, and one of ten thousand in
  which the questions are asked. "Added" is the time of `StateTracker.build_context` minus the same without recall; it
  includes the embedding of the new message.
- The cost of one large channel: the time from receiving a message until its prompt is built, for the first message after a
  restart and for later ones, and the time to delete a message, beside later messages in a channel of a thousand mentions.

Each size is measured in a process of its own, which does not load the libraries of training.

Run: ``kibitz bench tracker``.
"""

import asyncio
import multiprocessing
import re
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bot.chat.tracker import StateTracker
from bot.config import DialogueConfig, PolicyConfig
from bot.errors import DataError
from bot.memory.embedder import Embedder, make_embedder
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.models.tokenizer import ChatTokenizer
from bot.serving.children import end_with_parent
from bot.store.conversations import ConversationStore, DialogueRecord
from bot.store.database import Database
from bot.store.forgetting import forget_message
from bot.store.tables import embeddings
from bot.types import Conversation, Feedback, FeedbackKind, Message, Progress, Role, SamplingParams, Turn, new_id
from learning.fitting.dialogues import make_dialogue

MakeMention = Callable[[str, int, list[str]], DialogueRecord]  # called with a channel, a number and texts
SIZES = {"1e3": 1_000, "1e5": 100_000, "1e6": 1_000_000}  # messages in many channels
CHANNELS = {"2k": 2_000, "150k": 150_000}  # mentions in one large channel
SMALL = 1_000  # mentions in the channel that a large one is compared with
ASKED, USUAL = 10_000, 100  # messages in the channel with the questions, and in each other channel
QUESTIONS = 200
DELETED = 5  # messages that are deleted
DIMENSIONS = 384
BLOCK = 1_000  # conversations per write
PROMPT, ANSWER = tuple(range(300, 600)), tuple(range(300, 360))  # token ids of a mention


@dataclass(frozen=True)
class Parts:
    """The parts that every measurement uses."""

    embedder: Embedder | None
    tokenizer: ChatTokenizer
    learned: dict[str, float]
    progress: Progress


def measure_apart(
    policy: PolicyConfig, dialogue: DialogueConfig, data: Path, model: str, sizes: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Return the figures of `measure`, with each size in a process of its own. Raises the errors of that process."""
    embedder = make_embedder(dialogue, data)
    if embedder is not None:
        embedder.encode(["ready"])  # the first time it is converted, with libraries whose memory is not to be measured
        embedder.close()
    figures: dict[str, Any] = {"leaks": 0}
    context = multiprocessing.get_context("spawn")
    for size in sizes:
        ours, theirs = context.Pipe(duplex=False)
        given = theirs, policy, dialogue, data, model, size
        child = context.Process(target=_measure_in_child, args=given, daemon=True)
        child.start()
        theirs.close()
        found: Any = None
        with ours:
            while not isinstance(found, dict):
                try:
                    found = ours.recv()
                except EOFError:
                    raise DataError(f"the measurement of {size} ended early; free more memory and disk space") from None
                if isinstance(found, Exception):
                    raise found
                if isinstance(found, tuple):
                    progress(*found)
        child.join()
        figures |= found | {"leaks": figures["leaks"] + found["leaks"]}
    return figures


def _measure_in_child(ours: Any, policy: PolicyConfig, dialogue: DialogueConfig, data: Path, model: str, size: str) -> None:
    end_with_parent()
    try:
        tokenizer = ChatTokenizer(model, policy.template_args)
        learned = load_retrieval_weights(dialogue.retrieval_weights)
        job = measure(make_embedder(dialogue, data), tokenizer, learned, [size], lambda *done: ours.send(done))
        ours.send(asyncio.run(job))
    except Exception as error:
        ours.send(error)


async def measure(
    embedder: Embedder | None, tokenizer: ChatTokenizer, learned: dict[str, float], sizes: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Measure each of the sizes (keys of SIZES and CHANNELS) and return the figures: s, ms, MB, messages/s."""
    parts = Parts(embedder, tokenizer, learned, progress)
    figures: dict[str, Any] = {"leaks": 0}
    for size in sizes:
        found = await (_measure_channel(size, parts) if size in CHANNELS else _measure_added(size, parts))
        figures |= found | {"leaks": figures["leaks"] + found.get("leaks", 0)}
    return figures


@asynccontextmanager
async def _empty_recall(parts: Parts) -> AsyncIterator[tuple[Recall, Path]]:
    """Give a recall on an empty temporary database, and the database's file."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tracker.db"
        database = Database(f"sqlite:///{file}")
        database.upgrade()
        recall = Recall(Memory(database), parts.embedder, parts.learned)
        try:
            yield recall, file
        finally:
            recall.close()
            database.close()


async def _measure_added(size: str, parts: Parts) -> dict[str, Any]:
    async with _empty_recall(parts) as (recall, file):
        turns = SIZES[size]
        asked = min(ASKED, turns // 2)
        sizes = [asked, *[USUAL] * ((turns - asked) // USUAL)]
        channels = [new_id() for _ in sizes]
        mentions = [channel for channel, size in zip(channels, sizes, strict=True) for _ in range(size // 2)]
        began = time.perf_counter()
        await asyncio.to_thread(_fill, recall, mentions, parts.progress, _make_mention)
        rate = turns / (time.perf_counter() - began)
        added, leaks = await _time_remembering(recall, parts.tokenizer, channels[0])
        figures: dict[str, Any] = {"leaks": leaks, "inserts_per_s": rate}
        for percent in (50, 99):
            figures[f"added_p{percent}_ms_{size}"] = 1000 * float(np.percentile(added, percent))
        figures[f"file_mb_{size}"] = sum(one.stat().st_size for one in file.parent.glob("tracker.db*")) / 1e6
    return figures | {f"memory_mb_{size}": _peak_memory()}


def _peak_memory() -> float:
    """Return this process's peak memory (MB). VmHWM is preferred, because `ru_maxrss` may include that of its parent."""
    status = Path("/proc/self/status")
    if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else ""):
        return int(found[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


async def _measure_channel(size: str, parts: Parts) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    p99 = []
    for mentions in (SMALL, CHANNELS[size]):
        async with _empty_recall(parts) as (recall, _):
            channel = new_id()
            first_ids = await asyncio.to_thread(_fill, recall, [channel] * mentions, parts.progress, _make_turn)
            took = await _time_questions(recall, parts.tokenizer, channel)
            p99.append(1000 * float(np.percentile(took[1:], 99)))
            began = time.perf_counter()
            for message_id in first_ids[:DELETED]:
                await recall.memory.database.call(forget_message, recall.memory.database, message_id)
            figures[f"delete_message_s_{size}"] = (time.perf_counter() - began) / DELETED
            figures[f"first_message_s_{size}"] = took[0]
    return figures | {f"later_message_p99_ms_{size}": p99[1], f"later_message_p99_ratio_{size}": p99[1] / p99[0]}


def _fill(recall: Recall, channels: list[str], progress: Progress, make: MakeMention) -> list[str]:
    """Store a mention with vectors in each of `channels`, which may repeat. Return the ids of the last block's questions."""
    database, rng, total = recall.memory.database, np.random.default_rng(0), 2 * len(channels)
    store, texts = (
        ConversationStore(database),
        [turn["text"] for seed in range(20) for turn in make_dialogue(seed).conversation],
    )
    for start in range(0, len(channels), BLOCK):
        block = [make(one, number, texts) for number, one in enumerate(channels[start : start + BLOCK], start)]
        store.add_dialogues(block)
        said = [(place.id, message.id) for place, some, *_ in block for message in some]
        vectors = rng.integers(-127, 128, (len(said), DIMENSIONS), np.int8)
        with database.begin() as connection:
            connection.execute(embeddings.insert(), list(_rows(said, vectors, recall.space)))
        progress(f"storing {total:,} turns", 2 * min(len(channels), start + BLOCK), total)
    return [some[0].id for _, some, *_ in block]


def _make_mention(channel: str, number: int, texts: list[str]) -> DialogueRecord:
    """Make a mention of kibitz with its answer, without a turn."""
    place = Conversation("bench", channel, thread=str(number))
    asked, said = (f"{texts[(2 * number + one) % len(texts)]} {channel[-6:]}" for one in (0, 1))
    question = Message(place.id, f"user {number % 7}", asked)
    answer = Message(place.id, "kibitz", said, Role.ASSISTANT, reply_to=question.id)
    return place, [question, answer], [], []


def _make_turn(channel: str, number: int, texts: list[str]) -> DialogueRecord:
    """Make a mention whose answer has a turn's full record. One in ten was liked."""
    place, (question, answer), *_ = _make_mention(channel, number, texts)
    user, sampled = question.author_id, (PROMPT, ANSWER, (-0.5,) * len(ANSWER))
    ids = place.id, question.id, answer.id
    turn = Turn(*ids, answer.text, user, "policy-0", *sampled, "stop", SamplingParams(), 1.0)
    liked = [Feedback(turn.id, user, FeedbackKind.APPROVAL, "bench")] if number % 10 == 0 else []
    return place, [question, answer], [turn], liked


def _rows(said: list[tuple[str, str]], vectors: Any, space: str) -> Iterator[dict[str, Any]]:
    for (place, message_id), vector in zip(said, vectors, strict=True):
        yield {"conversation_id": place, "message_id": message_id, "space": space, "vector": vector.tobytes()}


def _questions() -> list[str]:
    asked = [question["text"] for seed in range(40, 60) for question in make_dialogue(seed).questions][:QUESTIONS]
    return [asked[0], *asked]


async def _time_remembering(recall: Recall, tokenizer: ChatTokenizer, channel: str) -> tuple[list[float], int]:
    """Return the time that recall adds to each question (s), without the first, which loads the channel; and the number of
    remembered messages from other channels.
    """
    store = ConversationStore(recall.memory.database)
    plain = StateTracker(store, tokenizer, recall, DialogueConfig(remembered=0), 1024)
    whole = StateTracker(store, tokenizer, recall, DialogueConfig(), 1024)
    asked = store.open_conversation(Conversation("bench", channel, thread="asked"))
    added, leaks = [], 0
    for text in _questions():
        message = Message(asked.id, "somebody", text)
        began = time.perf_counter()
        await plain.build_context(message)
        between = time.perf_counter()
        context = await whole.build_context(message)
        added.append(time.perf_counter() - between - (between - began))
        leaks += sum(store.read_conversation(one.message.conversation_id).channel != channel for one in context.remembered)
    return added[1:], leaks


async def _time_questions(recall: Recall, tokenizer: ChatTokenizer, channel: str) -> list[float]:
    """Return the time of each question, a mention of its own, from being received until its prompt is built (s)."""
    store, call = ConversationStore(recall.memory.database), recall.memory.database.call
    tracker = StateTracker(store, tokenizer, recall, DialogueConfig(), 1024)
    if recall.embedder is not None:
        recall.embedder.encode(["ready"])  # load it first, as kibitz does when it starts
    took = []

    def hear(place: Conversation, text: str) -> Any:
        heard = store.add_message_at(place, Message("", "somebody", text))
        return heard.message, tracker.read_surroundings(heard.message, heard.place)

    for number, text in enumerate(_questions()):
        began = time.perf_counter()
        await tracker.build_context(*await call(hear, Conversation("bench", channel, thread=f"asked {number}"), text))
        took.append(time.perf_counter() - began)
    return took
