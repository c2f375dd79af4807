"""Histories: find our own messages in a history that a client keeps itself.

Clients of the OpenAI API send the whole conversation with each question. A turn that was shown such a history names our
messages in it, as any other turn does (`Turn.shown`), so that consent and forgetting hold there too (laws 7 and 10). A
history has no ids, so messages are found by a fingerprint of their words within the client's space. Text that was never
sent to us before belongs to the question that it came with. The functions are synchronous; call them through
`Database.call`.
"""

import hashlib
from collections.abc import Sequence

import sqlalchemy as sa

from bot.store.conversations import MESSAGE_COLUMNS, as_message
from bot.store.database import Database
from bot.store.tables import chunks, conversations, fingerprints, messages
from bot.types import Conversation, Message, Role

ALIKE = 1000  # messages with the same words that are considered, the newest first


def fingerprint_text(role: Role, text: str) -> str:
    """Return a hash of a message's role and words. White space between the words does not matter."""
    return hashlib.blake2b(f"{role}\0{' '.join(text.split())}".encode(), digest_size=16).hexdigest()


def add_fingerprint(database: Database, message: Message, person: str) -> None:
    """Store the fingerprint of a stored message, for `find_repeated_messages`. `person` wrote it, or got it as an answer."""
    if message.text.strip():
        values = {"id": message.id, "place": message.conversation_id, "of": person}
        with database.begin() as connection:
            connection.execute(_ADD_FINGERPRINT, values | {"words": fingerprint_text(message.role, message.text)})


def find_repeated_messages(
    database: Database, place: Conversation, person: str, history: Sequence[Message]
) -> list[Message]:
    """Return the stored messages that a history (oldest first) repeats, and the questions of the answers among them.

    Only messages in the space of `place` are searched. Of several with the same words, the one that is question or answer to
    its neighbour in the history is preferred, then the newest of the same person, then the newest.
    """
    found: set[str] = set()
    asked = ""  # the id of the question of the next answer in the history
    with database.read() as connection:
        words = [fingerprint_text(said.role, said.text) for said in history]
        for said, before in reversed(list(zip(words, ["", *words], strict=False))):
            values = {"platform": place.platform, "space": place.space, "person": person, "asked": asked, "before": before}
            row = connection.execute(_FIND_REPEATED, values | {"words": said}).one_or_none()
            asked = "" if row is None else row.reply_to or ""
            found |= set() if row is None else {row.message_id, asked} - {""}
        query = sa.select(*MESSAGE_COLUMNS)
        return [
            as_message(row)
            for ids in chunks(sorted(found))
            for row in connection.execute(query.where(messages.c.id.in_(ids)))
        ]


def _text_parameter(name: str) -> sa.BindParameter[str]:
    return sa.bindparam(name, type_=sa.String)


_ADD_FINGERPRINT = fingerprints.insert().from_select(
    ["message_id", "platform", "space", "person", "words"],
    sa.select(
        _text_parameter("id"),
        conversations.c.platform,
        conversations.c.space,
        _text_parameter("of"),
        _text_parameter("words"),
    ).where(conversations.c.id == sa.bindparam("place")),
)
_same_words = (
    sa.select(fingerprints.c.message_id, fingerprints.c.person)
    .where(*(fingerprints.c[name] == _text_parameter(name) for name in ("platform", "space", "words")))
    .order_by(fingerprints.c.message_id.desc())
    .limit(ALIKE)
    .subquery()
)
_question = fingerprints.alias()
_FIND_REPEATED = (
    sa.select(_same_words.c.message_id, messages.c.reply_to)
    .join(messages, messages.c.id == _same_words.c.message_id)
    .outerjoin(_question, _question.c.message_id == messages.c.reply_to)
    .order_by(
        (_same_words.c.message_id == _text_parameter("asked")).desc(),
        (sa.func.coalesce(_question.c.words, "") == _text_parameter("before")).desc(),
        (_same_words.c.person == _text_parameter("person")).desc(),
        _same_words.c.message_id.desc(),
    )
    .limit(1)
)
