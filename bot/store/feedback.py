"""Reduce feedback rows to people's current opinions.

Feedback is append-only: giving and retracting are both rows. The functions are pure and do not depend on the database.
"""

from collections.abc import Iterable

from bot.types import Feedback, FeedbackKind, Reason

OPINION_KINDS = {FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL, FeedbackKind.RATING}


def not_retracted(feedback: Iterable[Feedback]) -> list[Feedback]:
    """Return the rows that were not retracted, oldest first. `feedback` may have any order.

    A retraction cancels the same person's earlier feedback with the same signal. A repeated event has no further effect.
    """
    latest: dict[tuple[str, str, str, str], Feedback] = {}
    for row in sorted(feedback, key=_sort_key):
        latest[row.turn_id, row.user_id, row.kind, row.signal] = row
    return sorted((row for row in latest.values() if not row.retracts), key=_sort_key)


def select_effective(feedback: Iterable[Feedback]) -> list[Feedback]:
    """Return the rows that count: of a person's approvals, disapprovals and ratings of a turn only the last is kept."""
    rows = not_retracted(feedback)
    opinion = {(row.turn_id, row.user_id): row.id for row in rows if row.kind in OPINION_KINDS}
    return [row for row in rows if row.kind not in OPINION_KINDS or opinion[row.turn_id, row.user_id] == row.id]


def find_reasons(feedback: Iterable[Feedback], user_id: str) -> set[Reason]:
    """Return the reasons that a person gives for disliking the turn of this feedback."""
    given = {row.signal for row in not_retracted(feedback) if row.user_id == user_id and row.kind == FeedbackKind.COMMENT}
    return {reason for reason in Reason if reason.signal in given}


def _sort_key(row: Feedback) -> tuple:
    return row.at, row.id
