"""Find the feedback that taught versions. The functions are synchronous; call them through `Database.call`."""

from collections.abc import Iterable

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.tables import chunks, feedback, run_feedback, run_followups, runs


def find_turns_that_taught(database: Database) -> set[str]:
    """Return the turns whose feedback ever taught a version."""
    query = sa.select(feedback.c.turn_id).distinct().join(run_feedback, run_feedback.c.feedback_id == feedback.c.id)
    with database.read() as connection:
        return set(connection.execute(query).scalars())


def find_feedback_that_taught(database: Database, feedback_ids: Iterable[str]) -> set[str]:
    """Return the ids among `feedback_ids` that ever taught a version."""
    query = sa.select(run_feedback.c.feedback_id).distinct()
    with database.read() as connection:
        rows = (connection.execute(query.where(run_feedback.c.feedback_id.in_(ids))) for ids in chunks(feedback_ids))
        return {one for found in rows for one in found.scalars()}


def find_taught_versions(database: Database, feedback_ids: Iterable[str], followup_ids: Iterable[str] = ()) -> list[str]:
    """Return the names of the versions that this feedback, or these follow-up messages, taught."""
    found: set[str] = set()
    with database.read() as connection:
        for column, teachers in ((run_feedback.c.feedback_id, feedback_ids), (run_followups.c.message_id, followup_ids)):
            query = sa.select(runs.c.policy).join(column.table, column.table.c.run_id == runs.c.id)
            for ids in chunks(teachers):
                found.update(connection.execute(query.where(column.in_(ids))).scalars())
    return sorted(found)
