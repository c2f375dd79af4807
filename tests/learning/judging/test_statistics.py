"""Areas, margins and bootstrap intervals, against scikit-learn and against resampling row by row."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from learning.judging import statistics
from learning.judging.statistics import accuracy, bootstrap, margin, unit_bootstrap

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 12, 60) / 4  # with ties
SIGNS = np.where(RNG.random(60) < 0.4, 1, -1)
TIMES = RNG.integers(0, 4, (5, 60)).astype(float)


def test_accuracy_is_the_area_under_the_roc_curve_also_with_weights():
    assert accuracy(VALUES, SIGNS) == pytest.approx(roc_auc_score(SIGNS, VALUES))
    wanted = [roc_auc_score(SIGNS, VALUES, sample_weight=row) for row in TIMES]
    assert accuracy(VALUES, SIGNS, TIMES) == pytest.approx(wanted)


def test_a_margin_with_weights_is_that_of_rows_that_are_repeated():
    for row, found in zip(TIMES, margin(VALUES, SIGNS, TIMES), strict=True):
        repeated = np.repeat(VALUES, row.astype(int)), np.repeat(SIGNS, row.astype(int))
        assert found == pytest.approx(margin(*repeated))
        assert found == pytest.approx(repeated[0][repeated[1] > 0].mean() - repeated[0][repeated[1] < 0].mean())


def test_intervals_are_those_of_resampling_row_by_row():
    rng = np.random.default_rng(1)
    groups = [np.flatnonzero(sign == SIGNS) for sign in (-1, 1)]
    picks = [np.concatenate([rng.choice(group, len(group)) for group in groups]) for _ in range(4000)]
    drawn = [margin(VALUES[pick], SIGNS[pick]) for pick in picks]
    found = bootstrap(lambda times: margin(VALUES, SIGNS, times), SIGNS, 0.95, seed=0, draws=4000)
    assert found.value == pytest.approx(margin(VALUES, SIGNS))
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)


def test_units_are_drawn_with_all_of_their_rows():
    units = [str(number // 6) for number in range(60)]
    rng = np.random.default_rng(1)
    picks = [np.concatenate([np.arange(6) + 6 * unit for unit in rng.integers(10, size=10)]) for _ in range(4000)]
    drawn = [roc_auc_score(SIGNS[pick], VALUES[pick]) for pick in picks]
    value, low, high = unit_bootstrap(accuracy, VALUES, SIGNS, units, seed=0, draws=4000)
    assert value == pytest.approx(roc_auc_score(SIGNS, VALUES))
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)
    single = unit_bootstrap(accuracy, VALUES, SIGNS, [str(number) for number in range(60)], seed=0, draws=4000)
    assert single[1:] != pytest.approx((low, high), abs=0.005), "the control"


def test_without_answers_of_both_kinds_there_is_no_interval():
    assert unit_bootstrap(accuracy, VALUES, np.ones(60), ["one"] * 60, seed=0) == (None, None, None)
    both_in_none = unit_bootstrap(accuracy, np.array([1.0, 2.0]), np.array([1, -1]), ["a", "b"], seed=3, draws=1)
    assert both_in_none == (0.0, None, None)


def test_many_rows_are_drawn_in_parts(monkeypatch):
    whole = bootstrap(lambda times: times @ VALUES, SIGNS, 0.95, seed=0)
    monkeypatch.setattr(statistics, "AT_ONCE", 600)
    parts = bootstrap(lambda times: times @ VALUES, SIGNS, 0.95, seed=0)
    assert [parts.low, parts.high] == pytest.approx([whole.low, whole.high], rel=0.03)
