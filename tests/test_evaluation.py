"""The gate: what it lets through, what it stops, and that it can tell the two apart."""

import numpy as np
import pytest

from bot.config import GateConfig
from learning.evaluation import Evidence, accuracy, bootstrap, by_chance, is_well_formed, judge, margin, mean_interval


def evidence(gain: float = 0.3, **changes) -> Evidence:
    signs = [1, 1, 1, -1, -1, -1] * 4
    rng = np.random.default_rng(0)
    live = rng.normal(-1, 0.3, len(signs))
    candidate = live + gain * np.array(signs) + rng.normal(0, 0.1, len(signs))
    found = {"conversations": [str(n) for n in range(len(signs))], "signs": signs, "live": live.tolist()}
    found |= {"candidate": candidate.tolist(), "kl": 0.1, "well_formed": 1.0, "base_well_formed": 1.0}
    return Evidence(**(found | changes))


def test_a_candidate_that_is_better_safe_and_sound_passes():
    verdict = judge(evidence(), GateConfig(), seed=0)
    assert verdict.passed
    assert verdict.figures["margin_gain"] == pytest.approx(0.6, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gain": 0.0}, "not shown to be better"),
        ({"gain": -0.3}, "not shown to be better"),
        ({"kl": 0.9}, "too far from the base"),
        ({"kl": float("nan")}, "too far from the base"),
        ({"well_formed": 0.8}, "answers break"),
        ({"signs": [1] * 24}, "too little evidence: 24 liked and 0 disliked"),
        ({"candidate": [float("nan")] * 24}, "not shown to be better"),
        ({"file_faults": ["adapter_model.safetensors: is missing"]}, "is missing"),
    ],
)
def test_no_evidence_no_promotion(changes, reason):
    verdict = judge(evidence(**changes), GateConfig(), seed=0)
    assert not verdict.passed
    assert reason in verdict.reasons[0]


@pytest.mark.parametrize("held_out", [6, 8, 24])
def test_opinions_at_random_pass_as_often_as_the_confidence_lets_them(held_out):
    rng = np.random.default_rng(0)
    draws = 300
    tests, intervals = 0, 0
    for _ in range(draws):
        gained, signs = rng.standard_t(3, held_out), rng.permutation([1, -1] * (held_out // 2))
        tests += by_chance(gained, signs, seed=0) <= 0.05
        lower = bootstrap(lambda pick, g=gained, s=signs: margin(g[pick], s[pick]), signs, 0.9, seed=0, draws=300)[1]
        intervals += lower > 0
    most = draws * 0.05 + 2 * (draws * 0.05 * 0.95) ** 0.5
    assert tests <= most
    if held_out < 10:
        assert intervals > most, "the control: an interval of so few is too narrow"


def test_what_people_do_mean_is_told_from_chance():
    signs = np.array([1, -1] * 8)
    rng = np.random.default_rng(0)
    gained = 0.1 * signs + rng.normal(0, 0.05, len(signs))
    assert by_chance(gained, signs, seed=0) < 0.001
    assert by_chance(-gained, signs, seed=0) > 0.999
    assert by_chance(np.zeros(16), signs, seed=0) == 1.0


def test_where_the_base_itself_does_not_answer_well_a_candidate_is_held_to_the_base():
    assert judge(evidence(well_formed=0.7, base_well_formed=0.6), GateConfig(), seed=0).passed
    assert not judge(evidence(well_formed=0.5, base_well_formed=0.6), GateConfig(), seed=0).passed


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Hey there! 👋", True),
        ("ok", True),
        ("", False),
        ("  \n", False),
        ("broken \ufffd", False),
        ("a<|im_start|>", False),
        ("go to the shop go to the shop go to the shop", False),
    ],
)
def test_an_answer_is_well_formed_if_it_reads_as_text(text, good):
    assert is_well_formed(text) == good


def test_accuracy_is_a_half_for_noise_and_one_for_a_perfect_order():
    signs = np.array([1, 1, -1, -1])
    assert accuracy(np.array([4.0, 3.0, 2.0, 1.0]), signs) == 1.0
    assert accuracy(np.zeros(4), signs) == 0.5


def test_an_interval_holds_the_mean_and_narrows_with_more_values():
    few, many = mean_interval([0.0, 1.0] * 5, seed=0), mean_interval([0.0, 1.0] * 100, seed=0)
    assert few[1] < few[0] == 0.5 < few[2]
    assert many[2] - many[1] < few[2] - few[1]
