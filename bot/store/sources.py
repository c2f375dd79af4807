"""Sources: record which messages an answer was made from, and follow these links in both directions.

An answer is made from its question and from the earlier messages in the prompt. Those may be answers themselves, so both
directions are recursive.
"""

from collections import defaultdict
from collections.abc import Iterable

import sqlalchemy as sa

from bot.store.tables import chunks, conversations, feedback, followups, messages, origins, sources, turns
from bot.types import FORGOTTEN, Person, Role, Turn


def add(connection: sa.Connection, answers: Iterable[Turn]) -> None:
    """Record the sources of these answers. Their turns and all source messages must be stored."""
    rows = [{"turn_id": turn.id, "message_id": message} for turn in answers for message in turn.sources]
    if rows:
        connection.execute(_INSERT, rows)


def find_answers_from(
    connection: sa.Connection, message_ids: sa.Select, turn_ids: sa.Select | None = None
) -> dict[str, str]:
    """Return the answers that were made from these messages, directly or through other answers: reply ids by turn id.

    `message_ids` and `turn_ids` select one column of ids. The selected turns are returned too, with the answers made from
    them. The time and the conversation of an answer do not matter.
    """
    made = sa.select(turns.c.id, turns.c.reply_id).join(sources, sources.c.turn_id == turns.c.id)
    begun = sources.c.message_id.in_(message_ids)
    found = made.where(begun if turn_ids is None else sa.or_(begun, turns.c.id.in_(turn_ids))).cte("found", recursive=True)
    found = found.union(made.join(found, found.c.reply_id == sources.c.message_id))
    return {row.id: row.reply_id for row in connection.execute(sa.select(found))}


def find_authors_behind(connection: sa.Connection, turn_ids: Iterable[str]) -> dict[str, set[str]]:
    """Return the user ids of all authors that each turn was made from, directly or through answers, by turn id."""
    wanted = list(turn_ids)
    people: defaultdict[str, set[str]] = defaultdict(set)
    made_from: defaultdict[str, set[str]] = defaultdict(set)
    for some in chunks(wanted):
        for turn_id, author, source in connection.execute(_STEPS, {"turns": some}):
            if source is None:
                people[turn_id].add(author)
            else:
                made_from[turn_id].add(source)
        for turn_id, author in connection.execute(_ORIGINS, {"turns": some}):
            people[turn_id].add(author)
    changes = True
    while changes:  # mostly one pass, because ids of later turns sort later; at most one per step from answer to answer
        changes = False
        for turn_id in sorted(made_from):
            more = set().union(*(people[one] for one in made_from[turn_id])) - people[turn_id]
            people[turn_id] |= more
            changes = changes or bool(more)
    return {one: people[one] for one in wanted}


def keep_origins(connection: sa.Connection, turn_ids: Iterable[str]) -> None:
    """Record the authors behind these turns, before any of their sources is erased."""
    found = find_authors_behind(connection, turn_ids)
    for some in chunks(found):
        connection.execute(origins.delete().where(origins.c.turn_id.in_(some)))
    rows = [{"turn_id": turn_id, "user_id": one} for turn_id, those in found.items() for one in those]
    if rows:
        connection.execute(origins.insert(), rows)


def find_people_behind(
    connection: sa.Connection, feedback_ids: Iterable[str], followup_ids: Iterable[str], turn_ids: Iterable[str] = ()
) -> set[Person]:
    """Return the authors of this feedback, of these follow-ups, and of the sources of the answers that they judge or that
    `turn_ids` name.
    """
    people: set[Person] = set()
    judged: dict[str, str] = {}  # the platform of each turn
    for some in chunks(turn_ids):
        judged |= {row.id: row.platform for row in connection.execute(_PLATFORMS.where(turns.c.id.in_(some)))}
    for query, column, ids in ((_OPINIONS, feedback.c.id, feedback_ids), (_FOLLOWUPS, followups.c.message_id, followup_ids)):
        for some in chunks(ids):
            for turn_id, platform, person in connection.execute(query.where(column.in_(some))):
                judged[turn_id] = platform
                people.add((platform, person))
    behind = find_authors_behind(connection, judged)
    return people | {(judged[turn_id], one) for turn_id, those in behind.items() for one in those}


def hold_turns(connection: sa.Connection, turn_ids: Iterable[str]) -> set[str]:
    """Return which of these turns are still stored. None of those is deleted before the transaction ends."""
    query = sa.select(turns.c.id).with_for_update(read=True, key_share=True)
    rows = (connection.execute(query.where(turns.c.id.in_(ids))) for ids in chunks(turn_ids))
    return {one for found in rows for one in found.scalars()}


_INSERT = sources.insert()
_PLATFORMS = sa.select(turns.c.id, conversations.c.platform).join(conversations)
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
_source = turns.alias()
_STEPS = (  # for each answer and source: the source's author, or the source's turn if it is an answer
    sa.select(_answers.c.id, messages.c.author_id, _source.c.id)
    .select_from(_answers)
    .join(sources, sources.c.turn_id == _answers.c.id)
    .join(messages, messages.c.id == sources.c.message_id)
    .outerjoin(_source, _source.c.reply_id == messages.c.id)
    .where(sa.or_(_source.c.id.is_not(None), sa.and_(messages.c.role == Role.USER, messages.c.author_id != FORGOTTEN)))
)
_ORIGINS = sa.select(_answers.c.id, origins.c.user_id).join(origins, origins.c.turn_id == _answers.c.id)
