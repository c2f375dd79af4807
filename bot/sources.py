"""Sources: the messages that an answer was made from, and the table that holds them, followed in both directions.

An answer is made from its question and from the earlier messages that the policy was shown. Those may be answers
themselves, so both directions are recursive. It knows nothing of forgetting and of training.
"""

from collections.abc import Iterable

import sqlalchemy as sa

from bot.tables import chunks, conversations, feedback, followups, messages, sources, turns
from bot.types import FORGOTTEN, Person, Role, Turn


def add(connection: sa.Connection, answers: Iterable[Turn]) -> None:
    """Record what these answers were made from. Their turns and all the messages must be stored."""
    rows = [{"turn_id": turn.id, "message_id": message} for turn in answers for message in turn.sources]
    if rows:
        connection.execute(_INSERT, rows)


def answers_from(connection: sa.Connection, message_ids: sa.Select) -> dict[str, str]:
    """Return the answers that were made from these messages, directly or through other answers: reply ids by turn id.

    `message_ids` selects one column of ids. When an answer was given, and in which conversation, does not matter.
    """
    made = sa.select(turns.c.id, turns.c.reply_id).join(sources, sources.c.turn_id == turns.c.id)
    found = made.where(sources.c.message_id.in_(message_ids)).cte("found", recursive=True)
    found = found.union(made.join(found, found.c.reply_id == sources.c.message_id))
    return {row.id: row.reply_id for row in connection.execute(sa.select(found))}


def people_behind(connection: sa.Connection, feedback_ids: Iterable[str], followup_ids: Iterable[str]) -> set[Person]:
    """Return everybody whose opinions or words are in this feedback, these follow-up messages, or the answers they judge."""
    people: set[Person] = set()
    judged: set[str] = set()
    for query, column, ids in ((_OPINIONS, feedback.c.id, feedback_ids), (_FOLLOWUPS, followups.c.message_id, followup_ids)):
        for some in chunks(ids):
            for turn_id, *person in connection.execute(query.where(column.in_(some))):
                judged.add(turn_id)
                people.add((person[0], person[1]))
    for some in chunks(sorted(judged)):
        people.update((row.platform, row.author_id) for row in connection.execute(_AUTHORS, {"turns": some}))
    return people


_INSERT = sources.insert()
_OPINIONS = (
    sa.select(turns.c.id, conversations.c.platform, feedback.c.user_id)
    .join(turns, turns.c.id == feedback.c.turn_id)
    .join(conversations, conversations.c.id == turns.c.conversation_id)
)
_FOLLOWUPS = (
    sa.select(followups.c.turn_id, conversations.c.platform, messages.c.author_id)
    .join(messages, messages.c.id == followups.c.message_id)
    .join(conversations, conversations.c.id == messages.c.conversation_id)
)
_answers = sa.select(turns.c.id).where(turns.c.id.in_(sa.bindparam("turns", expanding=True))).cte("answers", recursive=True)
_answers = _answers.union(
    sa.select(turns.c.id)
    .join(sources, sources.c.message_id == turns.c.reply_id)
    .join(_answers, _answers.c.id == sources.c.turn_id)
)
_AUTHORS = (
    sa.select(conversations.c.platform, messages.c.author_id)
    .distinct()
    .select_from(_answers)
    .join(sources, sources.c.turn_id == _answers.c.id)
    .join(messages, messages.c.id == sources.c.message_id)
    .join(conversations, conversations.c.id == messages.c.conversation_id)
    .where(messages.c.role == Role.USER, messages.c.author_id != FORGOTTEN)
)
