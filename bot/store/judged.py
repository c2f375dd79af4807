"""Find the turns with feedback by their ids, so that callers read only the ones they need.

The functions are synchronous; call them through `Database.call`.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.tables import conversations, feedback, followups, run_feedback, turns


@dataclass(frozen=True)
class JudgedTurn:
    """A turn with feedback, and the message that it answers. Other turns may answer the same message."""

    turn_id: str
    message_id: str


def find_judged_turns(database: Database, space: str | None = None, followed_up: bool = False) -> list[JudgedTurn]:
    """Return all turns with feedback, oldest first, or those of one imported `space`.

    With `followed_up`, turns that only have follow-ups are included.
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
