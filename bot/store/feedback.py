"""What still stands of all that people said about answers.

Feedback is an append-only record; giving and taking back are both rows of it. `standing` folds the rows into each
person's present opinion. It is pure: it knows no database, no reward and no platform.
"""

from collections.abc import Iterable

from bot.types import Feedback, FeedbackKind

OPINIONS = {FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL, FeedbackKind.RATING}


def held(feedback: Iterable[Feedback]) -> list[Feedback]:
    """The rows that nobody took back, oldest first, whatever order they came in.

    A retraction takes back what the same person said with the same signal before it. The same event twice has one effect.
    """
    latest: dict[tuple[str, str, str, str], Feedback] = {}
    for row in sorted(feedback, key=_when):
        latest[row.turn_id, row.user_id, row.kind, row.signal] = row
    return sorted((row for row in latest.values() if not row.retracts), key=_when)


def standing(feedback: Iterable[Feedback]) -> list[Feedback]:
    """The rows that count: of a person's approvals, disapprovals and ratings of one turn only the last that is held."""
    rows = held(feedback)
    opinion = {(row.turn_id, row.user_id): row.id for row in rows if row.kind in OPINIONS}
    return [row for row in rows if row.kind not in OPINIONS or opinion[row.turn_id, row.user_id] == row.id]


def _when(row: Feedback) -> tuple:
    return row.at, row.id
