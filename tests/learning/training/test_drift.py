"""Drift: a change of taste is found where it is, and noise, a better bot and a raid are none."""

from pathlib import Path

import numpy as np
import pytest
from conftest import converse, react
from test_training import quiet

from bot.errors import NothingToLearn
from bot.store.registry import BASE
from learning.training.drift import FEWEST_OPINIONS, Drift, find_change_point
from learning.training.run import train_version

NOBODY: tuple[str, ...] = ()


def opinions(rng, good: np.ndarray, mistakes: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Learned rewards and opinions of answers that are good or not: the reward knows it in part, people err sometimes."""
    learned = rng.normal(size=len(good)) + np.where(good, 1.0, -1.0)
    return learned, good ^ (rng.random(len(good)) < mistakes)


def found(learned: np.ndarray, liked: np.ndarray, people=None) -> Drift | None:
    return find_change_point(learned, liked, people or [NOBODY] * len(liked), cap=0.25)


def better_and_better(rng, count: int) -> np.ndarray:
    """Answers of a bot that learns: half of them are good at first, and nearly all at last."""
    return rng.random(count) < np.linspace(0.5, 0.9, count)


@pytest.mark.parametrize("seed", range(8))
def test_a_change_of_taste_is_found_where_it_is_and_a_better_bot_is_none(seed):
    rng = np.random.default_rng(seed)
    learned, liked = opinions(rng, better_and_better(rng, 200))
    assert found(learned, liked) is None, "the control"
    more, theirs = opinions(rng, rng.random(48) < 0.9)
    turned = found(np.concatenate([learned, more]), np.concatenate([liked, ~theirs]))
    assert turned is not None
    assert turned.against
    assert abs(turned.since - 200) <= 12


@pytest.mark.parametrize("seed", range(4))
def test_where_the_policy_has_turned_already_it_is_what_came_before_that_counts_no_more(seed):
    rng = np.random.default_rng(seed)
    old, liked = opinions(rng, rng.random(120) < 0.5)
    new, theirs = opinions(rng, rng.random(120) < 0.5)
    turned = found(np.concatenate([-old, new]), np.concatenate([liked, theirs]))
    assert turned == Drift(turned.since, against=False)
    assert abs(turned.since - 120) <= 12


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("fits", [0.0, 1.0])
def test_random_opinions_are_no_change(share, fits):
    """Also where the policy learned those before by heart (`fits`)."""
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        liked, learned = rng.random(240) < share, rng.normal(size=240)
        learned[:200] += fits * np.where(liked[:200], 1.0, -1.0)
        alarms += found(learned, liked) is not None
    assert alarms <= 2


def test_a_raid_by_one_is_no_change_and_the_same_by_many_is():
    rng = np.random.default_rng(0)
    learned, liked = opinions(rng, better_and_better(rng, 200))
    more, theirs = opinions(rng, rng.random(60) < 0.9)
    wrong = theirs ^ (np.arange(60) % 10 < 8)  # four fifths say the opposite of what they think
    everything, said = np.concatenate([learned, more]), np.concatenate([liked, wrong])
    crowd = [(f"person{number % 20}",) for number in range(200)]
    by_one = [("raider",) if number % 10 < 8 else (f"person{number}",) for number in range(60)]
    assert found(everything, said, crowd + by_one) is None
    by_many = [(f"person{number}",) for number in range(60)]
    assert found(everything, said, crowd + by_many) is not None, "the control"


def test_too_few_opinions_are_no_change_and_who_learned_nothing_has_nothing_to_unlearn():
    liked = np.arange(80) < 40
    for count in (0, 1, FEWEST_OPINIONS, 2 * FEWEST_OPINIONS - 1):
        assert found(np.ones(count), liked[:count]) is None
    assert found(np.zeros(80), liked) is None
    assert found(np.linspace(1, 2, 80), liked) is not None, "the control: it has learned to say what is liked no more"


def test_what_people_said_before_they_came_to_want_the_opposite_counts_no_more(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True)
    first = train_version(small, quiet)
    registry.promote(first.policy)
    converse(store, tokenizer, likes_emoji=False, count=48)
    deaf = small.model_copy(update={"learning": small.learning.model_copy(update={"detect_drift": False})})
    control = train_version(deaf, quiet)
    assert registry.get(control.policy).parent == first.policy
    assert not control.passed, "the old opinions outvote the new ones, also at the gate"
    told: list[str] = []
    second = train_version(small, lambda stage, done, total: told.append(stage))
    assert registry.get(second.policy).parent == BASE
    assert second.passed, second.reasons
    gone = second.snapshot.dropped["older than the detected change of opinions"]
    assert 52 <= gone <= 76, "those 64, give or take where it began"
    assert any("came to want the opposite" in stage for stage in told)
    registry.promote(second.policy)
    third = train_version(small, quiet)
    assert registry.get(third.policy).parent == second.policy
    assert third.snapshot.dropped["older than the detected change of opinions"] == gone, "it stays so"


def test_a_run_is_told_where_only_new_opinions_of_one_kind_are_left(small, store, registry, tokenizer):
    converse(store, tokenizer, likes_emoji=True)
    registry.promote(train_version(small, quiet).policy)
    for turn in store.find_turns_with_feedback():
        react(store, turn, approves=False)
    assert Path(registry.get_live().path).is_dir()
    with pytest.raises(NothingToLearn, match=r"every reward is -1\.00"):
        train_version(small, quiet)
