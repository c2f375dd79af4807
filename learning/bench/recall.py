"""Benchmark of recall: are the messages that answer a question among the first that recall finds?

It reads conversations with questions as JSON lines (`{"conversation": [{"id", "speaker", "at", "text"}…], "questions":
[{"text", "evidence": [ids], "category"}…]}`), stores them as kibitz would, and asks the real recall. The baselines are
recency, dense vectors alone and BM25 alone, in the same process. The asker is never one of the speakers.

Run: ``kibitz bench recall FILE``.
"""

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bot.errors import DataError
from bot.memory.embedder import Embedder
from bot.memory.recall import Recall
from bot.memory.scope import Memory
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.types import Conversation, Message, Progress, new_id

FIRST = (5, 10, 20)
FORM = '{"conversation": [{"id", "speaker", "text"}, …], "questions": [{"text", "evidence": [id, …]}, …]}'
ALONE: dict[str, dict[str, float]] = {"dense": {"dense": 1.0}, "bm25": {"bm25": 1.0}}


class SpokenLine(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str
    speaker: str
    text: str
    at: datetime | str | None = None


class Question(BaseModel):
    """A question about a conversation, and the ids of the messages that answer it."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    text: str
    evidence: list[str]
    category: str = "all"


class ConversationWithQuestions(BaseModel):
    """One conversation with its questions."""

    conversation: Annotated[list[SpokenLine], Field(min_length=1)]
    questions: list[Question]

    def list_answerable(self) -> list[tuple[Question, list[str]]]:
        """Return the questions with evidence in the conversation, and that evidence; unknown ids are left out."""
        ids = {said.id for said in self.conversation}
        known = [(question, [one for one in question.evidence if one in ids]) for question in self.questions]
        return [(question, evidence) for question, evidence in known if evidence]


def read(path: Path) -> list[ConversationWithQuestions]:
    """Read the conversations of a file. Raises DataError that names the line and its fault."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); give a UTF-8 file whose lines are {FORM}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            asked = ConversationWithQuestions.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}." for part in first["loc"])[:-1]
            fault = f"{where}: {first['msg']}" if where else first["msg"]
            raise DataError(f"{path}, line {number}: {fault}; each line must be {FORM}") from error
        found.append(asked)
    if not any(asked.list_answerable() for asked in found):
        raise DataError(f"{path} has no question whose evidence names a message of its conversation; check the ids")
    return found


async def measure(
    conversations: list[ConversationWithQuestions],
    embedder: Embedder | None,
    weights: Mapping[str, float],
    progress: Progress,
) -> dict[str, Any]:
    """Ask all questions and return the figures: recall and MRR in [0, 100], times in ms."""
    places: dict[str, list[tuple[Question, list[int]]]] = {name: [] for name in ("tracker", "recency", *ALONE)}
    took: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        database = Database(f"sqlite:///{scratch}/recall.db")
        database.upgrade()
        recall = Recall(Memory(database), embedder, weights)
        try:
            for number, asked in enumerate(conversations):
                ids, place = await _store(database, asked)
                await recall.embed_missing(lambda *_: None)
                for question, evidence in asked.list_answerable():
                    wanted = {ids[one] for one in evidence}
                    message = Message(place, f"asker {new_id()}", question.text)
                    for name, only in {"tracker": weights, **ALONE}.items():
                        recall.weights = only
                        began = time.perf_counter()
                        found = await recall.find(message, FIRST[-1])
                        if name == "tracker":
                            took.append(time.perf_counter() - began)
                        order = [one.message.id for one in found]
                        places[name].append((question, _ranks(order, wanted)))
                    places["recency"].append((question, _ranks(list(reversed(ids.values())), wanted)))
                progress("conversations", number + 1, len(conversations))
        finally:
            recall.close()
            database.close()
    asked_in_all = sum(len(asked.questions) for asked in conversations)
    return _compute_figures(places, took) | {"left_out": asked_in_all - len(took)}


async def _store(database: Database, asked: ConversationWithQuestions) -> tuple[dict[str, str], str]:
    """Store one conversation in a scope of its own. Returns stored message ids by ids in the file, and the conversation."""
    store = ConversationStore(database)
    place = Conversation("recall", new_id())
    said = [Message(place.id, turn.speaker, turn.text, at=_time(turn.at)) for turn in asked.conversation]
    await database.call(store.add_dialogues, [(place, said, [], [])])
    return {turn.id: message.id for turn, message in zip(asked.conversation, said, strict=True)}, place.id


def _time(given: datetime | str | None) -> datetime:
    if isinstance(given, datetime):
        return given if given.tzinfo else given.replace(tzinfo=UTC)
    return datetime.now(UTC)


def _ranks(order: list[str], wanted: set[str]) -> list[int]:
    """Return the rank of each wanted message, from 1; 0 if it was not found."""
    return [order.index(one) + 1 if one in order else 0 for one in sorted(wanted)]


def _recall(rows: Iterable[tuple[Question, list[int]]], first: int) -> float:
    return 100 * float(np.mean([np.mean([0 < rank <= first for rank in ranks]) for _, ranks in rows]))


def _compute_figures(places: Mapping[str, list[tuple[Question, list[int]]]], took: list[float]) -> dict[str, Any]:
    rows = places["tracker"]
    figures: dict[str, Any] = {f"recall_at_{first}": _recall(rows, first) for first in FIRST}
    figures["hit_at_10"] = 100 * float(np.mean([any(0 < rank <= 10 for rank in ranks) for _, ranks in rows]))
    figures["mrr"] = 100 * float(np.mean([max((1 / rank for rank in ranks if rank), default=0.0) for _, ranks in rows]))
    for name in ("recency", *ALONE):
        figures[f"{name}_recall_at_10"] = _recall(places[name], 10)
    kinds: defaultdict[str, list[tuple[Question, list[int]]]] = defaultdict(list)
    for row in rows:
        kinds[row[0].category].append(row)
    for category, some in sorted(kinds.items()):
        figures[f"recall_at_10_{category}"] = _recall(some, 10)
    for percent in (50, 99):
        figures[f"query_p{percent}_ms"] = 1000 * float(np.percentile(took, percent))
    return figures | {"questions": len(rows)}


def format_json_lines(dialogues: Iterable[Any]) -> str:
    """Format generated dialogues (`learning.fitting.dialogues`) as this benchmark reads them."""
    return "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in dialogues)
