"""Benchmark of the tracker: what remembering adds to a message, with a thousand to a million stored turns.

The turns are spread over scopes of a hundred, and one of ten thousand that is asked; their vectors are random directions,
which cost what real ones cost. "Added" is the time of `StateTracker.context` beyond the same without remembering; the new
message's own embedding is in it. It knows no policy.

Run: ``kibitz bench tracker``.
"""

import asyncio
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bot.config import DialogueConfig
from bot.conversations import ConversationStore
from bot.database import Database
from bot.embeddings import Embedder
from bot.memory import Memory
from bot.recall import Recall
from bot.tables import embeddings
from bot.tokenizer import ChatTokenizer
from bot.tracker import StateTracker
from bot.types import Conversation, Message, new_id
from learning.dialogues import dialogue

Progress = Callable[[str, int, int], None]
SIZES = {"1e3": 1_000, "1e5": 100_000, "1e6": 1_000_000}
ASKED, USUAL = 10_000, 100  # turns in the scope that is asked, and in each other
QUESTIONS = 200
DIMENSIONS = 384
BLOCK = 100  # conversations written at once


async def measure(
    embedder: Embedder | None, tokenizer: ChatTokenizer, weights: dict[str, float], sizes: list[str], progress: Progress
) -> dict[str, Any]:
    """The figures for each size: ms, MB, turns/s."""
    figures: dict[str, Any] = {"leaks": 0}
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "tracker.db"
            database = Database(f"sqlite:///{file}")
            database.upgrade()
            recall = Recall(Memory(database), embedder, weights)
            try:
                began = time.perf_counter()
                asked = await asyncio.to_thread(_filled, database, SIZES[size], recall.space, progress)
                figures["inserts_per_s"] = SIZES[size] / (time.perf_counter() - began)
                added, leaks = await _added(recall, tokenizer, asked)
                figures["leaks"] += leaks
            finally:
                recall.close()
                database.close()
            for percent in (50, 99):
                figures[f"added_p{percent}_ms_{size}"] = 1000 * float(np.percentile(added, percent))
            figures[f"file_mb_{size}"] = sum(one.stat().st_size for one in file.parent.glob("tracker.db*")) / 1e6
            figures[f"memory_mb_{size}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return figures


def _filled(database: Database, turns: int, space: str, progress: Progress) -> Conversation:
    """Store so many turns with vectors; the conversation that will be asked."""
    store, rng = ConversationStore(database), np.random.default_rng(0)
    texts = [turn["text"] for seed in range(20) for turn in dialogue(seed).conversation]
    sizes = [min(ASKED, turns // 2), *[USUAL] * ((turns - min(ASKED, turns // 2)) // USUAL)]
    places = [Conversation("bench", new_id()) for _ in sizes]
    done = 0
    for start in range(0, len(sizes), BLOCK):
        block = list(zip(places[start : start + BLOCK], sizes[start : start + BLOCK], strict=True))
        said = [[_said(place, texts, number) for number in range(size)] for place, size in block]
        store.add_dialogues((place, some, [], []) for (place, _), some in zip(block, said, strict=True))
        with database.begin() as connection:
            for (place, size), some in zip(block, said, strict=True):
                vectors = rng.integers(-127, 128, (size, DIMENSIONS), np.int8)
                rows = zip((one.id for one in some), vectors, strict=True)
                connection.execute(embeddings.insert(), list(_rows(place.id, rows, space)))
                done += size
        progress(f"storing {turns:,} turns", done, turns)
    return places[0]


def _said(place: Conversation, texts: list[str], number: int) -> Message:
    return Message(place.id, f"user {number % 7}", f"{texts[number % len(texts)]} {place.id[-6:]}")


def _rows(place: str, vectors: Any, space: str) -> Iterator[dict[str, Any]]:
    for message_id, vector in vectors:
        yield {"conversation_id": place, "message_id": message_id, "space": space, "vector": vector.tobytes()}


async def _added(recall: Recall, tokenizer: ChatTokenizer, asked: Conversation) -> tuple[list[float], int]:
    """What remembering adds to each of the questions (s), after one that reads the scope; and what came from elsewhere."""
    store = ConversationStore(recall.memory.database)
    plain = StateTracker(store, tokenizer, recall, DialogueConfig(remembered=0), 1024)
    whole = StateTracker(store, tokenizer, recall, DialogueConfig(), 1024)
    questions = [question["text"] for seed in range(40, 60) for question in dialogue(seed).questions][:QUESTIONS]
    added, leaks = [], 0
    for text in [questions[0], *questions]:
        message = Message(asked.id, "somebody", text)
        began = time.perf_counter()
        await plain.context(message)
        between = time.perf_counter()
        context = await whole.context(message)
        added.append(time.perf_counter() - between - (between - began))
        leaks += sum(one.message.conversation_id != asked.id for one in context.remembered)
    return added[1:], leaks
