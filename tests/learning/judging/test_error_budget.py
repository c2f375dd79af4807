"""The error budget: what all verdicts of a data directory may leave to luck together."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learning.judging.error_budget import compute_next_level


def levels(budget: float, verdicts: list[bool]) -> list[float]:
    return [compute_next_level(budget, verdicts[:number]) for number in range(len(verdicts))]


def test_without_a_promotion_all_levels_together_stay_within_the_budget():
    spent = levels(0.05, [False] * 2000)
    assert 0.9 * 0.9 * 0.05 < sum(spent) < 0.05
    assert all(later < earlier for earlier, later in pairwise(spent))


@given(st.lists(st.booleans(), max_size=60), st.floats(0.001, 0.4))
def test_all_levels_together_stay_within_a_budget_for_each_promotion(verdicts, budget):
    """What LORD++ promises: the levels that were spent are at most the budget times the promotions, one at least."""
    assert sum(levels(budget, verdicts)) <= budget * max(1, sum(verdicts)) + 1e-12


@pytest.mark.parametrize("quiet", [1, 10, 50])
def test_a_promotion_gives_back_what_makes_the_next_one_possible(quiet):
    before = compute_next_level(0.05, [True] + [False] * quiet)
    after = compute_next_level(0.05, [True] + [False] * quiet + [True])
    assert after > 2 * before
