"""Judged: which turns people said something about, by their ids alone, so that only those are read that are wanted.

Synchronous, called through `Database.call`; it knows no reward and no run.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.tables import conversations, feedback, followups, run_feedback, turns


@dataclass(frozen=True)
class JudgedTurn:
    """A turn that somebody reacted to, and the message that it answers, as other turns may."""

    turn_id: str
    message_id: str


def find_judged_turns(database: Database, space: str | None = None, followed_up: bool = False) -> list[JudgedTurn]:
    """Return all turns that anyone reacted to, oldest first; of one imported `space` where it is given. With `followed_up`
    also those that something was only said after.
    """
    is_judged: sa.ColumnElement[bool] = turns.c.id.in_(sa.select(feedback.c.turn_id))
    if followed_up:
        is_judged = sa.or_(is_judged, turns.c.id.in_(sa.select(followups.c.turn_id)))
    query = sa.select(turns.c.id, turns.c.message_id).where(is_judged)
    if space is not None:
        query = query.join(conversations).where(conversations.c.space == space)
    with database.read() as connection:
        return [JudgedTurn(row.id, row.message_id) for row in connection.execute(query.order_by(turns.c.id))]


def find_reconsidered_turns(database: Database) -> set[str]:
    """Return the turns of opinions that taught a run and about which more was said."""
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
