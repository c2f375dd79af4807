"""Follow-ups: classifies a message after an answer as approval, disapproval, correction, repetition or other.

The classifier is a logistic regression on the message's embedding and its similarity to question and answer. Its
probabilities are calibrated on held-out phrases. They are recorded with the turn, and count as a reward only if the operator
sets it so.
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
    """Return the classifier's input (dimensions + 6); `vectors` (3 × dimensions) are of message, question and answer."""
    said, asked, answered = (set(extract_words(one)) for one in (text, question, answer))
    shared = (len(said & asked) / max(1, len(said | asked)), len(said & answered) / max(1, len(said | answered)))
    asks = float(text.rstrip().endswith("?"))
    return np.concatenate([vectors[0], [*(vectors[1:] @ vectors[0]), *shared, asks, np.log1p(len(said)) / 4]])


def predict_chances(inputs: np.ndarray) -> dict[str, float]:
    """Return the calibrated probability of each of KINDS."""
    weights, bias = _load_weights()
    scores = weights @ inputs + bias
    found = np.exp(scores - scores.max())
    return dict(zip(KINDS, (found / found.sum()).tolist(), strict=True))


@cache
def _load_weights() -> tuple[np.ndarray, np.ndarray]:
    learned = json.loads(WEIGHTS_FILE.read_text())
    return np.array(learned["weights"]), np.array(learned["bias"])


class FollowUps:
    """The recorded follow-ups."""

    def __init__(self, recall: Recall):
        self.recall = recall
        self.database = recall.memory.database
        self._lock = asyncio.Lock()

    async def record(self, message: Message) -> FollowUp | None:
        """Record a message as a follow-up to the answer before it.

        Returns None, and records nothing, if another person asked for that answer or a vector is missing.
        """
        await self.recall.flush()
        async with self._lock:  # one at a time, so that answers can use the database's thread in between
            return await self.database.call(self._record, message)

    def find_for_turn(self, turn_id: str) -> list[FollowUp]:
        """Return the follow-ups to a turn."""
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
        if len(known) < len(ids):  # there is no embedder, or a message was forgotten meanwhile
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
