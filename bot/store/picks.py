"""Picks: which of two answers to one question a person finds better.

A pick is two acts of feedback with the signal PICK and the same time: approval of the better answer, disapproval of the
other one. Both are committed in one transaction. The functions are synchronous; call them through `Database.call`.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from bot.errors import DataError
from bot.store.conversations import ConversationStore
from bot.store.feedback import not_retracted
from bot.types import Feedback, FeedbackKind, Pick, Turn, new_id

PICK = "pick"  # the signal


def find_earlier_answer(store: ConversationStore, turn_id: str) -> Turn | None:
    """Return the answer that a turn replaces, or None if the two cannot be compared.

    They cannot if the question was edited after the earlier answer: then the two may answer different words.
    """
    turn = store.find_turn(turn_id)
    earlier = None if turn is None or turn.replaces is None else store.find_turn(turn.replaces)
    if earlier is None:
        return None
    question = store.read_message(earlier.message_id)
    return earlier if question.edited_at is None or question.edited_at < earlier.at else None


def find_pick(store: ConversationStore, turn_id: str, user_id: str) -> list[Feedback]:
    """Return the two acts of a person's pick between a turn and the answer that it replaces; the act on the turn is last.

    Return an empty list if the person picked neither, or took the pick back.
    """
    turn = store.find_turn(turn_id)
    if turn is None or turn.replaces is None:
        return []
    said = store.read_feedback_on([turn.replaces, turn_id])
    earlier, later = (
        {row.at: row for row in not_retracted(said.get(one, [])) if (row.user_id, row.signal) == (user_id, PICK)}
        for one in (turn.replaces, turn_id)
    )
    # A turn may be part of two pairs. The two acts of one pick have the same time.
    common = [at for at in earlier.keys() & later.keys() if earlier[at].kind != later[at].kind]
    return [earlier[max(common)], later[max(common)]] if common else []


def prefers_new(acts: Sequence[Feedback]) -> bool:
    """Return which answer the acts of `find_pick` prefer: True for the new one, False for the one that it replaces."""
    return acts[-1].kind == FeedbackKind.APPROVAL


def record_pick(store: ConversationStore, pick: Pick) -> list[Feedback]:
    """Commit a pick in place of the person's earlier one. Return its two acts; the one on the new answer is last.

    The same pick again, or the same event, changes nothing. Raises DataError if there are no two answers to compare.
    """
    with store.database.begin():
        earlier = find_earlier_answer(store, pick.turn_id)
        if earlier is None:
            raise DataError(
                f"there is nothing to pick: turn '{pick.turn_id}' is not a second answer to an unchanged question; "
                "regenerate an answer, and pick between the two"
            )
        standing = find_pick(store, pick.turn_id, pick.user_id)
        if standing and prefers_new(standing) == pick.prefers_new:
            return standing
        kinds = (FeedbackKind.DISAPPROVAL, FeedbackKind.APPROVAL)
        acts = [
            Feedback(turn_id, pick.user_id, kind, PICK, at=pick.at)
            for turn_id, kind in zip((earlier.id, pick.turn_id), kinds if pick.prefers_new else kinds[::-1], strict=True)
        ]
        is_new = _append(store, [*acts, *_retractions(standing, pick.at)], pick.event_id)
        return acts if is_new else standing


def retract_pick(store: ConversationStore, pick: Pick) -> bool:
    """Take back both acts of a person's pick, whichever answer it prefers. Return False if there is none."""
    with store.database.begin():
        standing = find_pick(store, pick.turn_id, pick.user_id)
        return _append(store, _retractions(standing, pick.at), pick.event_id)


def _retractions(acts: Sequence[Feedback], at: datetime) -> list[Feedback]:
    return [replace(act, id=new_id(), at=at, event_id=None, retracts=True) for act in acts]


def _append(store: ConversationStore, acts: list[Feedback], event_id: str | None) -> bool:
    """Append acts, all or none. Return False, and append none, if there are none or their event is known."""
    if not acts or not store.add_feedback(replace(acts[0], event_id=event_id)):
        return False
    for act in acts[1:]:
        store.add_feedback(act)
    return True
