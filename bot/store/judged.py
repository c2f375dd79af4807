"""Find the turns with feedback, or without any, by their ids, so that callers read only the ones they need.

The functions are synchronous; call them through `Database.call`.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.tables import conversations, feedback, followups, run_feedback, turns

_HAS_FEEDBACK = turns.c.id.in_(sa.select(feedback.c.turn_id))
_HAS_FOLLOWUP = turns.c.id.in_(sa.select(followups.c.turn_id))


@dataclass(frozen=True)
class JudgedTurn:
    """A turn with feedback, and the message that it answers. Other turns may answer the same message."""

    turn_id: str
    message_id: str


def find_judged_turns(database: Database, space: str | None = None) -> list[JudgedTurn]:
    """Return all turns with feedback, oldest first, or those of one imported `space`."""
    return _find_turns(database, _HAS_FEEDBACK, space)


def find_judged_or_followed_turns(database: Database, space: str | None = None) -> list[JudgedTurn]:
    """Return all turns with feedback or a follow-up, oldest first, or those of one imported `space`."""
    return _find_turns(database, _HAS_FEEDBACK | _HAS_FOLLOWUP, space)


def _find_turns(database: Database, condition: sa.ColumnElement[bool], space: str | None) -> list[JudgedTurn]:
    query = sa.select(turns.c.id, turns.c.message_id).where(condition)
    if space is not None:
        query = query.join(conversations).where(conversations.c.space == space)
    with database.read() as connection:
        return [JudgedTurn(row.id, row.message_id) for row in connection.execute(query.order_by(turns.c.id))]


def find_unjudged_turns(database: Database, newest: int, except_on: str) -> list[str]:
    """Return the newest turns with neither feedback nor a follow-up, except those on one platform, newest first."""
    query = sa.select(turns.c.id).join(conversations).where(~_HAS_FEEDBACK, ~_HAS_FOLLOWUP)
    query = query.where(conversations.c.platform != except_on).order_by(turns.c.id.desc()).limit(newest)
    with database.read() as connection:
        return list(connection.execute(query).scalars())


def find_reconsidered_turns(database: Database) -> set[str]:
    """Return the turns whose feedback taught a run and that also have other feedback."""
    other = feedback.alias()
    query = (
        sa.select(feedback.c.turn_id)
        .distinct()
        .join(run_feedback, run_feedback.c.feedback_id == feedback.c.id)
        .join(other, other.c.turn_id == feedback.c.turn_id)
        .where(other.c.id != feedback.c.id)
    )
    with database.read() as connection:
        return set(connection.execute(query).scalars())
