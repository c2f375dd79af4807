"""Picks: two acts that are committed, changed and taken back together."""

from dataclasses import replace
from datetime import timedelta

import pytest
from conftest import answered, react

from bot.errors import DataError
from bot.store.feedback import find_reasons, not_retracted
from bot.store.picks import PICK, find_pick, prefers_new, record_pick, retract_pick
from bot.types import Feedback, FeedbackKind, Pick, Reason, Turn, new_id, now
from connectors.reasons import make_acts


def regenerated(store, turn: Turn) -> Turn:
    again = replace(turn, id=new_id(), reply_id=new_id(), text="Another.", replaces=turn.id, at=now())
    store.add_turn(again)
    return again


def standing(store, *turns: Turn, signal: str = PICK) -> list[list[str]]:
    """Return the kinds of what people said about each turn and did not take back."""
    said = store.read_feedback_on([turn.id for turn in turns])
    return [[str(row.kind) for row in not_retracted(said.get(turn.id, [])) if row.signal == signal] for turn in turns]


@pytest.fixture
def pair(store, tokenizer) -> tuple[Turn, Turn]:
    first = answered(store, tokenizer, "hello", "Hey there!")
    return first, regenerated(store, first)


def test_a_pick_is_two_acts_that_change_and_go_together(store, pair):
    new, old = Pick(pair[1].id, "ann", prefers_new=True), Pick(pair[1].id, "ann", prefers_new=False)
    assert find_pick(store, pair[1].id, "ann") == []
    record_pick(store, new)
    assert standing(store, *pair) == [["disapproval"], ["approval"]]
    record_pick(store, new)
    assert sum(map(len, store.read_feedback_on([turn.id for turn in pair]).values())) == 2, "the same pick adds nothing"
    acts = record_pick(store, replace(old, at=now()))
    assert standing(store, *pair) == [["approval"], ["disapproval"]]
    assert find_pick(store, pair[1].id, "ann") == acts
    assert not prefers_new(acts)
    assert retract_pick(store, replace(new, at=now()))  # whichever it is
    assert standing(store, *pair) == [[], []]
    assert not retract_pick(store, replace(new, at=now()))
    record_pick(store, replace(new, at=now()))
    assert standing(store, *pair) == [["disapproval"], ["approval"]], "the control: it may be given again"


def test_an_event_that_comes_twice_picks_once(store, pair):
    pick = Pick(pair[1].id, "ann", prefers_new=True, event_id="press 1")
    record_pick(store, pick)
    assert not retract_pick(store, replace(pick, at=now())), "the same press, delivered again, takes nothing back"
    assert standing(store, *pair) == [["disapproval"], ["approval"]]
    assert retract_pick(store, replace(pick, at=now(), event_id="press 2"))
    assert record_pick(store, replace(pick, at=now())) == []
    assert standing(store, *pair) == [[], []]


def test_in_a_chain_of_answers_each_pair_has_its_own_pick(store, pair):
    """Else a pick between the second and the third would look like one between the first and the second."""
    third = regenerated(store, pair[1])
    fourth = regenerated(store, third)
    record_pick(store, Pick(pair[1].id, "ann", prefers_new=True))
    record_pick(store, Pick(fourth.id, "ann", prefers_new=False))
    assert standing(store, *pair, third, fourth) == [["disapproval"], ["approval"], ["approval"], ["disapproval"]]
    assert find_pick(store, third.id, "ann") == []
    record_pick(store, Pick(third.id, "ann", prefers_new=True))
    assert prefers_new(find_pick(store, third.id, "ann"))
    assert standing(store, pair[1]) == [["approval", "disapproval"]]
    retract_pick(store, Pick(third.id, "ann", prefers_new=True))
    assert standing(store, *pair) == [["disapproval"], ["approval"]], "the pick before stands again"


def test_what_cannot_be_compared_is_not_picked(store, pair):
    with pytest.raises(DataError, match="there is nothing to pick"):
        record_pick(store, Pick(pair[0].id, "ann", prefers_new=True))
    with pytest.raises(DataError, match="there is nothing to pick"):
        record_pick(store, Pick("no turn", "ann", prefers_new=True))
    pick = Pick(pair[1].id, "ann", prefers_new=True)
    record_pick(store, pick)
    store.edit_message(pair[0].message_id, "goodbye", pair[0].at + timedelta(seconds=1))
    with pytest.raises(DataError, match="unchanged question"):
        record_pick(store, replace(pick, prefers_new=False))
    assert retract_pick(store, replace(pick, at=now())), "what was said may always be taken back"
    assert standing(store, *pair) == [[], []]


def test_a_pick_leaves_what_was_said_by_other_means(store, pair):
    thumb = react(store, pair[0], approves=True, user="ann")
    record_pick(store, Pick(pair[1].id, "ann", prefers_new=True))
    record_pick(store, Pick(pair[1].id, "bob", prefers_new=False))
    retract_pick(store, Pick(pair[1].id, "ann", prefers_new=True))
    assert standing(store, pair[0], signal=thumb.signal) == [["approval"]]
    assert standing(store, *pair) == [["approval"], ["disapproval"]], "bob's"


def test_reasons_stand_side_by_side_and_go_when_they_are_unticked(store, pair):
    def tick(*reasons: Reason) -> None:
        said = store.read_feedback_on([pair[0].id]).get(pair[0].id, [])
        for act in make_acts(find_reasons(said, "ann"), reasons, pair[0].id, "ann"):
            store.add_feedback(act)

    def found(user: str = "ann") -> set[Reason]:
        return find_reasons(store.read_feedback_on([pair[0].id]).get(pair[0].id, []), user)

    for wanted in ({Reason.WRONG, Reason.TONE}, {Reason.TONE, Reason.UNSAFE}, set(), set(Reason)):
        tick(*wanted)
        assert found() == wanted
    assert found("bob") == set()
    store.add_feedback(Feedback(pair[0].id, "bob", FeedbackKind.COMMENT, "reason", text="wrong"))
    assert found("bob") == set(), "a comment in a person's own words is no ticked reason"
    assert all(len(reason.signal) <= 64 for reason in Reason)  # the column
