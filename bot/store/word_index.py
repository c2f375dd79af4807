"""Word index: which messages of a scope hold a word, in the database, and the table that says so.

It finds what is too old to be in memory. It knows no vectors and no ranking.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable

import sqlalchemy as sa

from bot.store.tables import chunks, messages, words
from bot.store.words import FUNCTION_WORDS, extract_content_words
from bot.store.words import extract_words as words_of

MAX_WORD_LENGTH = 64  # characters of a word, and
MAX_WORDS = 64  # words of a message, and of a question, at most
MAX_MESSAGES_PER_WORD = 256  # messages with a word that are looked at; a word that more of them hold tells little

Text = tuple[str, str]  # a message's id and its text


def add(connection: sa.Connection, texts: Iterable[Text]) -> None:
    """Record the words of stored messages."""
    rows = [
        {"id": message_id, "word": word} for message_id, text in texts for word in _limit_words(extract_content_words(text))
    ]
    if rows:
        connection.execute(_ADD, rows)


def remove(connection: sa.Connection, message_ids: Iterable[str]) -> None:
    """Remove the words of messages."""
    for ids in chunks(message_ids):
        connection.execute(words.delete().where(words.c.message_id.in_(ids)))


def find(connection: sa.Connection, scopes: Collection[int], question: str, before: str, limit: int) -> list[str]:
    """Return the `limit` messages older than `before` that share the rarest words with a question: their ids, oldest first.

    Of messages that share the same words the newest are taken.
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
