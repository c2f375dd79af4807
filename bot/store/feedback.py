"""What still stands of all that people said about answers.

Feedback is an append-only record; giving and taking back are both rows of it. `select_effective` folds the rows into each
person's present opinion. It is pure: it knows no database, no reward and no platform.
"""

from collections.abc import Iterable

from bot.types import Feedback, FeedbackKind

OPINION_KINDS = {FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL, FeedbackKind.RATING}


def not_retracted(feedback: Iterable[Feedback]) -> list[Feedback]:
    """The rows that nobody took back, oldest first, whatever order they came in.

    A retraction takes back what the same person said with the same signal before it. The same event twice has one effect.
    """
    latest: dict[tuple[str, str, str, str], Feedback] = {}
    for row in sorted(feedback, key=_sort_key):
        latest[row.turn_id, row.user_id, row.kind, row.signal] = row
    return sorted((row for row in latest.values() if not row.retracts), key=_sort_key)


def select_effective(feedback: Iterable[Feedback]) -> list[Feedback]:
    """The rows that count: of a person's approvals, disapprovals and ratings of one turn only the last that is held."""
    rows = not_retracted(feedback)
    opinion = {(row.turn_id, row.user_id): row.id for row in rows if row.kind in OPINION_KINDS}
    return [row for row in rows if row.kind not in OPINION_KINDS or opinion[row.turn_id, row.user_id] == row.id]


def _sort_key(row: Feedback) -> tuple:
    return row.at, row.id
