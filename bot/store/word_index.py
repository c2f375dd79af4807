"""Word index: find the messages of a scope that contain a word.

The index is in the database. It finds messages that are too old to be in memory.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable

import sqlalchemy as sa

from bot.store.tables import chunks, messages, words
from bot.store.words import FUNCTION_WORDS, extract_content_words
from bot.store.words import extract_words as words_of

MAX_WORD_LENGTH = 64  # characters of a word that are indexed
MAX_WORDS = 64  # words of a message or a question that are used
MAX_MESSAGES_PER_WORD = 256  # messages that are read per word; a more frequent word says little

Text = tuple[str, str]  # a message's id and its text


def add(connection: sa.Connection, texts: Iterable[Text]) -> None:
    """Index the words of stored messages."""
    rows = [
        {"id": message_id, "word": word} for message_id, text in texts for word in _limit_words(extract_content_words(text))
    ]
    if rows:
        connection.execute(_ADD, rows)


def remove(connection: sa.Connection, message_ids: Iterable[str]) -> None:
    """Remove messages from the index."""
    for ids in chunks(message_ids):
        connection.execute(words.delete().where(words.c.message_id.in_(ids)))


def find(connection: sa.Connection, scopes: Collection[int], question: str, before: str, limit: int) -> list[str]:
    """Return the ids of the `limit` messages before `before` that share the rarest words with a question, oldest first.

    Of messages that share the same words the newest come first.
    """
    shared: defaultdict[str, float] = defaultdict(float)
    for word in _limit_words(set(words_of(question)) - FUNCTION_WORDS):
        values = {"scopes": list(scopes), "word": word, "before": before, "most": MAX_MESSAGES_PER_WORD}
        found = connection.execute(_FIND, values).scalars().all()
        for message_id in found:
            shared[message_id] += math.log1p(MAX_MESSAGES_PER_WORD / len(found))
    best = sorted(shared, key=lambda one: (shared[one], one), reverse=True)
    return sorted(best[:limit])


def _limit_words(found: set[str]) -> list[str]:
    return sorted({word[:MAX_WORD_LENGTH] for word in found})[:MAX_WORDS]


_ADD = words.insert().from_select(
    ["scope", "word", "message_id"],
    sa.select(messages.c.scope, sa.bindparam("word", type_=sa.String), messages.c.id).where(
        messages.c.id == sa.bindparam("id")
    ),
)
_FIND = (
    sa.select(words.c.message_id)
    .where(
        words.c.scope.in_(sa.bindparam("scopes", expanding=True)),
        words.c.word == sa.bindparam("word"),
        words.c.message_id < sa.bindparam("before"),
    )
    .order_by(words.c.message_id.desc())
    .limit(sa.bindparam("most"))
)
