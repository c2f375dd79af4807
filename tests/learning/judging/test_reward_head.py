"""The reward head: it finds a taste in few reactions, and in reactions by lot none."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from learning.judging.best_of_n import FEW_E_VALUE, MANY_E_VALUE
from learning.judging.reward_head import RewardHead

GROUPS = (10, 4)
UNSEEN = 200
NOISE = 0.1
LOOKS = range(12, 41, 4)  # reactions after which a head is fitted


@dataclass(frozen=True)
class Series:
    """The places of 40 judged answers and of UNSEEN others, which of them people would like, and what they said."""

    places: np.ndarray
    meant: np.ndarray
    liked: np.ndarray

    def fit(self, reactions: int) -> RewardHead:
        return fit(self.places[:reactions], self.liked[:reactions])

    def measure_ranking(self, reactions: int) -> float:
        """How often the head prefers an unseen answer that people would like to one that they would not."""
        mean, _ = self.fit(reactions).predict(self.places[-UNSEEN:])
        meant = self.meant[-UNSEEN:]
        return float((mean[meant][:, None] > mean[~meant]).mean())


def fit(places: np.ndarray, liked: np.ndarray) -> RewardHead:
    return RewardHead.fit(places, liked, np.ones(len(liked)), GROUPS)


def draw_series(seed: int, *, is_by_lot: bool) -> Series:
    """People like answers with one of the features. One reaction in ten is a mistake, or all are drawn by lot."""
    rng = np.random.default_rng(seed)
    count = LOOKS[-1] + UNSEEN
    places = np.hstack([rng.choice([-1.0, 1.0], (count, 4)), rng.normal(size=(count, sum(GROUPS) - 4)).clip(-3, 3)])
    meant = places[:, seed % 6] > 0
    said = rng.random(count) < 0.5 if is_by_lot else np.where(rng.random(count) < NOISE, ~meant, meant)
    return Series(places, meant, said[: LOOKS[-1]])


@pytest.mark.parametrize(("reactions", "right"), [(20, 0.9), (30, 0.95)])
def test_after_few_reactions_unseen_answers_are_ranked_by_the_taste(reactions, right):
    taught, by_lot = (
        [draw_series(seed, is_by_lot=is_by_lot).measure_ranking(reactions) for seed in range(12)]
        for is_by_lot in (False, True)
    )
    assert np.mean(taught) > right
    assert np.mean(by_lot) == pytest.approx(0.5, abs=0.2)
    assert np.mean([one > other for one, other in zip(taught, by_lot, strict=True)]) > 0.8


def test_a_taste_is_proven_within_forty_reactions_and_reactions_by_lot_hardly_ever():
    proven = [draw_series(seed, is_by_lot=False).fit(LOOKS[-1]).e_value >= MANY_E_VALUE for seed in range(20)]
    assert np.mean(proven) > 0.8
    by_lot = [draw_series(seed, is_by_lot=True) for seed in range(60)]
    peaks = np.array([max(one.fit(step).e_value for step in LOOKS) for one in by_lot])
    assert (peaks >= MANY_E_VALUE).sum() <= 6, "1 in 20 may"
    assert (peaks >= FEW_E_VALUE).sum() <= 30, "1 in 3 may"


def test_a_taste_for_two_features_together_is_found_where_none_alone_tells_it():
    rng = np.random.default_rng(0)
    places = rng.choice([-1.0, 1.0], (60, sum(GROUPS)))
    places[:, 2:] = rng.normal(size=(60, sum(GROUPS) - 2)).clip(-3, 3)
    head = fit(places, places[:, 0] + places[:, 1] + rng.normal(0, 0.3, 60) > 0)
    assert head.sets[0].features == (0, 1)
    assert head.coefficients[0] > 0.5 < head.coefficients[1]


def test_a_head_is_less_sure_of_answers_unlike_those_that_were_judged():
    series = draw_series(3, is_by_lot=False)
    near, far = np.zeros((1, sum(GROUPS))), np.full((1, sum(GROUPS)), 3.0)
    head = series.fit(40)
    assert head.predict(far)[1] > head.predict(near)[1]


def test_a_head_that_is_written_and_read_predicts_the_same():
    series = draw_series(1, is_by_lot=False)
    head = series.fit(24)
    again = RewardHead.from_json(json.loads(json.dumps(head.as_json())))
    for first, second in zip(head.predict(series.places), again.predict(series.places), strict=True):
        assert (first == second).all()
    assert again.e_value == head.e_value
    assert again.coefficients == head.coefficients
    other = series.fit(20)  # the control
    assert (other.predict(series.places)[0] != head.predict(series.places)[0]).any()


@pytest.mark.parametrize("liked", [np.ones(20, bool), np.zeros(20, bool)], ids=["all liked", "none liked"])
def test_opinions_of_one_kind_prove_nothing(liked):
    places = draw_series(0, is_by_lot=False).places[:20]
    assert fit(places, liked).e_value < FEW_E_VALUE


def test_answers_that_are_all_alike_prove_nothing_and_are_predicted_alike():
    head = fit(np.ones((20, sum(GROUPS))), np.arange(20) % 2 > 0)
    assert head.e_value < FEW_E_VALUE
    mean, sd = head.predict(draw_series(0, is_by_lot=False).places[:20])
    assert len({*mean.tolist()}) == len({*sd.tolist()}) == 1
    assert head.coefficients == {}


def test_opinions_that_weigh_little_prove_less():
    series = draw_series(2, is_by_lot=False)
    given = series.places[:40], series.liked
    assert RewardHead.fit(*given, np.full(40, 0.2), GROUPS).e_value < series.fit(40).e_value
