"""What still stands of what people said, and what it is worth."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from bot.config import RewardsConfig
from bot.store.feedback import OPINION_KINDS, select_effective
from bot.types import Feedback, FeedbackKind
from learning.data.rewards import compute_reward

START = datetime(2026, 1, 1, tzinfo=UTC)
USERS = ["asker", "ann", "bob"]

acts = st.builds(
    Feedback,
    turn_id=st.just("turn"),
    user_id=st.sampled_from(USERS),
    kind=st.sampled_from(list(FeedbackKind)),
    signal=st.sampled_from(["👍", "❤️", "button"]),
    retracts=st.booleans(),
    at=st.integers(0, 50).map(lambda seconds: START + timedelta(seconds=seconds)),
    id=st.uuids().map(str),
)


def said(user: str, kind: FeedbackKind, second: int, signal: str = "button", retracts: bool = False) -> Feedback:
    return Feedback("turn", user, kind, signal, retracts, at=START + timedelta(seconds=second))


@given(st.lists(acts, max_size=12), st.randoms())
def test_the_order_in_which_feedback_arrives_changes_nothing(rows, rng):
    shuffled = list(rows)
    rng.shuffle(shuffled)
    assert select_effective(shuffled) == select_effective(rows)
    assert compute_reward(shuffled, "asker", RewardsConfig()) == compute_reward(rows, "asker", RewardsConfig())


@given(st.lists(acts, max_size=12))
def test_the_same_event_twice_has_one_effect(rows):
    assert compute_reward(rows + rows, "asker", RewardsConfig()) == compute_reward(rows, "asker", RewardsConfig())


@given(st.lists(acts, max_size=12))
def test_a_reward_is_bounded_and_each_person_has_one_opinion(rows):
    earned = compute_reward(rows, "asker", RewardsConfig())
    if earned is not None:
        assert -1 <= earned.value <= 1
        assert all(-1 <= opinion <= 1 for opinion in earned.opinions.values())
    opinions = [row.user_id for row in select_effective(rows) if row.kind in OPINION_KINDS]
    assert len(opinions) == len(set(opinions))


@given(st.lists(acts, max_size=8), st.sampled_from(sorted(OPINION_KINDS)))
def test_a_reaction_and_its_retraction_by_a_new_person_are_a_no_op(rows, kind):
    both = [said("new", kind, 60), said("new", kind, 61, retracts=True)]
    assert compute_reward(rows + both, "asker", RewardsConfig()) == compute_reward(rows, "asker", RewardsConfig())


def test_the_last_opinion_wins_and_taking_it_back_leaves_the_one_of_another_signal():
    up, down = said("ann", FeedbackKind.APPROVAL, 1, "👍"), said("ann", FeedbackKind.DISAPPROVAL, 2, "👎")
    assert select_effective([up, down]) == [down]
    assert select_effective([up, down, said("ann", FeedbackKind.DISAPPROVAL, 3, "👎", retracts=True)]) == [up]


def test_silence_is_no_reward_and_not_a_reward_of_zero():
    assert compute_reward([], "asker", RewardsConfig()) is None
    assert compute_reward([said("ann", FeedbackKind.RANK, 1)], "asker", RewardsConfig()) is None


def test_the_asker_outweighs_a_bystander_and_many_voices_of_one_person_are_one():
    rows = [said("asker", FeedbackKind.APPROVAL, 1), said("ann", FeedbackKind.DISAPPROVAL, 2)]
    earned = compute_reward(rows, "asker", RewardsConfig())
    assert earned is not None
    assert 0 < earned.value < 1
    loud = [said("ann", FeedbackKind.DISAPPROVAL, n, signal=str(n)) for n in range(20)]
    assert compute_reward([rows[0], *loud], "asker", RewardsConfig()).value == earned.value


def test_regenerating_an_answer_counts_half_against_it():
    assert compute_reward([said("asker", FeedbackKind.REGENERATE, 1)], "asker", RewardsConfig()).value == -0.5
