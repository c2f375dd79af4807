"""From how many answers the evidence lets choose, with what chances, and when it lets no more."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning.judging.best_of_n import (
    FEW,
    FEW_E_VALUE,
    MANY,
    MANY_E_VALUE,
    Approval,
    compute_chances,
    count_candidates,
    is_harmful,
)

finite = st.floats(-50, 50)


@pytest.mark.parametrize(
    ("e_value", "most", "count"),
    [(0.0, 8, 1), (2.99, 8, 1), (3.0, 8, FEW), (19.9, 8, FEW), (20.0, 8, MANY), (1e300, 64, 64), (20.0, 2, 2), (3.0, 3, 3)],
)
def test_more_evidence_lets_choose_from_more_answers(e_value, most, count):
    assert count_candidates(e_value, most) == count
    assert FEW_E_VALUE < MANY_E_VALUE


@given(st.floats(0, 1e300), st.integers(1, 64))
def test_there_are_never_more_answers_than_asked_for_and_never_none(e_value, most):
    assert 1 <= count_candidates(e_value, most) <= most
    assert count_candidates(e_value, most) <= count_candidates(e_value * 2, most)


@given(st.lists(finite, min_size=1, max_size=8))
def test_chances_sum_to_one_and_follow_the_scores(values):
    scores = np.array(values)
    chances = compute_chances(scores)
    assert chances.sum() == pytest.approx(1)
    assert np.isfinite(chances).all()
    assert (np.diff(chances[np.argsort(scores)]) >= 0).all()
    assert compute_chances(scores + 3) == pytest.approx(chances)


@given(finite, st.integers(1, 8))
def test_equal_scores_have_equal_chances(score, count):
    assert compute_chances(np.full(count, score)) == pytest.approx(np.full(count, 1 / count))
    ahead = compute_chances(np.array([score, score + 0.2]))  # the control
    assert ahead[1] > 0.8


@pytest.mark.parametrize(
    ("chosen", "plain", "harmful"),
    [
        (Approval(), Approval(), False),
        (Approval(0, 3), Approval(), False),
        (Approval(2, 20), Approval(14, 8), True),
        (Approval(14, 8), Approval(2, 20), False),
        (Approval(10, 10), Approval(10, 10), False),
        (Approval(9, 11), Approval(11, 9), False),
    ],
)
def test_answers_are_chosen_no_more_if_people_like_them_less_than_plain_ones(chosen, plain, harmful):
    assert is_harmful(chosen, plain) == harmful


def test_a_choice_that_changes_nothing_is_rarely_called_harmful_and_a_bad_one_nearly_always():
    rng = random.Random(0)

    def draw(rate: float, count: int) -> Approval:
        liked = sum(rng.random() < rate for _ in range(count))
        return Approval(liked, count - liked)

    assert np.mean([is_harmful(draw(0.5, 40), draw(0.5, 40)) for _ in range(400)]) < 0.08
    assert np.mean([is_harmful(draw(0.2, 40), draw(0.6, 40)) for _ in range(400)]) > 0.95
