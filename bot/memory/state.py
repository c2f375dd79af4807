"""State: derives the topic, participants, open questions and facts of a conversation from its messages.

It is derived anew each time, so that it keeps nothing of forgotten messages.
Run: ``kibitz state CONVERSATION``.
"""

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bot.memory.embedder import Embedder
from bot.memory.facts import Fact, resolve_facts
from bot.memory.topics import find_topic_starts
from bot.store.words import FUNCTION_WORDS, extract_words
from bot.types import FORGOTTEN, Message, Role

LATEST_MESSAGES = 400  # messages that are read; retrieval finds older facts and questions
ANSWER_WINDOW = 4  # messages after a question that may answer it
ANSWER_SIMILARITY = 0.35  # the least cosine similarity of an answer by somebody else
REQUEST_PATTERN = re.compile(
    r"\b(?:remind (?:me|us)|don't forget|to-?do|(?:can|could|would|will) you(?: please)?|please)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class ConversationState:
    """The state of one conversation."""

    topic: list[Message]  # the messages since the topic last changed
    participants: dict[str, int]  # number of messages by person, the last writer first
    unanswered: list[Message]  # questions and requests
    facts: list[Fact]
    former_facts: list[Fact]  # replaced by newer ones


def derive_state(messages: Sequence[Message], embedder: Embedder | None) -> ConversationState:
    """Return the state of a conversation with these messages, oldest first.

    Without an embedder only words separate topics, which works less well.
    """
    said = [one for one in messages if one.author_id != FORGOTTEN and one.text.strip()][-LATEST_MESSAGES:]
    vectors = _embed_texts([one.text for one in said], embedder)
    begins = np.flatnonzero(find_topic_starts([one.text for one in said], vectors)) if said else [0]
    writers = [one.author_id for one in said if one.role == Role.USER]
    counts = Counter(writers)
    facts, former = resolve_facts(said)
    return ConversationState(
        topic=said[int(begins[-1]) :],
        participants={name: counts[name] for name in dict.fromkeys(reversed(writers))},
        unanswered=[one for number, one in enumerate(said) if _is_request(one) and not _is_answered(number, said, vectors)],
        facts=facts,
        former_facts=former,
    )


def _is_request(message: Message) -> bool:
    text = message.text.rstrip()
    return message.role == Role.USER and (text.endswith(("?", "？")) or bool(REQUEST_PATTERN.search(text[:500])))


def _is_answered(number: int, said: Sequence[Message], vectors: np.ndarray) -> bool:
    """Tell whether a message replies to this one, or another person soon wrote a similar one that is no request."""
    asked = said[number]
    for later in range(number + 1, len(said)):
        other = said[later]
        if other.reply_to == asked.id:
            return True
        near = later <= number + ANSWER_WINDOW and other.author_id != asked.author_id
        if near and not _is_request(other) and float(vectors[number] @ vectors[later]) >= ANSWER_SIMILARITY:
            return True
    return False


def _embed_texts(texts: Sequence[str], embedder: Embedder | None) -> np.ndarray:
    """Return a unit vector of each text (n × dimensions), from the embedder, or without one from its words."""
    if embedder is not None:
        return embedder.encode(texts)
    vectors = np.zeros((len(texts), 1024), np.float32)
    for row, text in enumerate(texts):
        for word in set(extract_words(text)) - FUNCTION_WORDS:
            vectors[row, zlib.crc32(word.encode()) % vectors.shape[1]] = 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
