"""Follow-ups: what a message says about the answer before it: approval, disapproval, a correction, or the question again.

A logistic regression on the message's embedding and on how like the question and the answer it is; its probabilities are
calibrated on phrases that it did not learn from. They are recorded beside the turn, and are no reward unless the operator
says so. It knows no platform and no reward.
"""

import asyncio
import json
from functools import cache
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from bot.memory.recall import Recall
from bot.store.tables import UTCDateTime, followups, messages, turns
from bot.store.words import extract_words
from bot.types import FollowUp, Message

WEIGHTS_FILE = Path(__file__).parent / "followup_weights.json"
KINDS = ("approval", "disapproval", "correction", "repetition", "other")


def compute_features(text: str, question: str, answer: str, vectors: np.ndarray) -> np.ndarray:
    """What is looked at (dimensions + 6): `vectors` (3 × dimensions) are those of the message, the question, the answer."""
    said, asked, answered = (set(extract_words(one)) for one in (text, question, answer))
    shared = (len(said & asked) / max(1, len(said | asked)), len(said & answered) / max(1, len(said | answered)))
    asks = float(text.rstrip().endswith("?"))
    return np.concatenate([vectors[0], [*(vectors[1:] @ vectors[0]), *shared, asks, np.log1p(len(said)) / 4]])


def predict_chances(inputs: np.ndarray) -> dict[str, float]:
    """The calibrated probability of each kind."""
    weights, bias = _load_weights()
    scores = weights @ inputs + bias
    found = np.exp(scores - scores.max())
    return dict(zip(KINDS, (found / found.sum()).tolist(), strict=True))


@cache
def _load_weights() -> tuple[np.ndarray, np.ndarray]:
    learned = json.loads(WEIGHTS_FILE.read_text())
    return np.array(learned["weights"]), np.array(learned["bias"])


class FollowUps:
    """What people said next, recorded by turn."""

    def __init__(self, recall: Recall):
        self.recall = recall
        self.database = recall.memory.database
        self._lock = asyncio.Lock()

    async def record(self, message: Message) -> FollowUp | None:
        """Record what a message says about the answer before it, where its author had asked for that one."""
        await self.recall.flush()
        async with self._lock:  # whoever waits for an answer comes in between
            return await self.database.call(self._record, message)

    def find_for_turn(self, turn_id: str) -> list[FollowUp]:
        """What was said after a turn."""
        with self.database.read() as connection:
            rows = connection.execute(followups.select().where(followups.c.turn_id == turn_id)).all()
        return [FollowUp(row.turn_id, row.message_id, row.chances) for row in rows]

    def _record(self, message: Message) -> FollowUp | None:
        with self.database.read() as connection:
            turn = connection.execute(_BEFORE, {"place": message.conversation_id, "at": message.at}).one_or_none()
            if turn is None or turn.asker_id != message.author_id:
                return None
        ids = [message.id, turn.message_id, turn.reply_id]
        known = self.recall.memory.read_vectors(ids, self.recall.space)
        if len(known) < len(ids):  # no embedder, or something was forgotten meanwhile
            return None
        vectors = np.stack([known[one] for one in ids])
        found = FollowUp(
            turn.id, message.id, predict_chances(compute_features(message.text, turn.question, turn.answer, vectors))
        )
        with self.database.begin() as connection:
            connection.execute(followups.delete().where(followups.c.message_id == message.id))
            connection.execute(followups.insert(), vars(found))
        return found


_asked, _replied = messages.alias(), messages.alias()
_BEFORE = (
    sa.select(
        *(turns.c[name] for name in ("id", "asker_id", "message_id", "reply_id")),
        *(_asked.c.text.label("question"), _replied.c.text.label("answer")),
    )
    .join(_asked, _asked.c.id == turns.c.message_id)
    .join(_replied, _replied.c.id == turns.c.reply_id)
    .where(turns.c.conversation_id == sa.bindparam("place"), turns.c.at < sa.bindparam("at", type_=UTCDateTime()))
    .order_by(turns.c.at.desc(), turns.c.id.desc())
    .limit(1)
)
