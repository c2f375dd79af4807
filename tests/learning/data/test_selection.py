"""What one run learns from: rewards against what is usual, nobody above their share, a reason for all that is left out."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.config import RewardsConfig
from learning.data.comparison import pair_best_with_worst, with_advantages
from learning.data.experience import Experience
from learning.data.rewards import advantages
from learning.data.selection import (
    assign_advantages,
    cap_people,
    cluster_questions,
    draw_batches,
    draw_fresh_and_old,
    drop_near_duplicates,
    group_by_length,
    is_held_out,
)

REWARDS = st.lists(st.floats(-1, 1), min_size=1, max_size=40)


def experience(name: str, reward: float = 1.0, **changes) -> Experience:
    made = Experience(
        name, name, (1, 2), (3, 4), None, reward, (), asker="ann", opinion_holders=("ann",), question=name, answer="hey"
    )
    return replace(made, **changes)


@given(REWARDS, st.floats(0, 20))
def test_an_advantage_is_bounded_and_does_not_depend_on_the_order(rewards, prior):
    values = np.array(rewards)
    worth = advantages(values, np.zeros(len(values)), prior)
    assert np.abs(worth).max() <= 2
    assert advantages(values[::-1], np.zeros(len(values)), prior)[::-1] == pytest.approx(worth)


def test_an_easy_prompts_approval_is_no_credit_and_a_hard_ones_is():
    rewards = np.array([1.0] * 20 + [-1.0] * 19 + [1.0])
    easy, hard = np.zeros(20, int), np.ones(20, int)
    worth = advantages(rewards, np.concatenate([easy, hard]), prior=2)
    assert 0 < worth[0] < 0.3, "liked, like all answers to such prompts"
    assert worth[-1] > 1.5, "liked, where nothing else is"
    together = advantages(rewards, np.zeros(40, int), prior=2)
    assert together[0] == together[-1], "the control: without kinds both count the same"


def test_a_kind_of_which_little_was_seen_is_drawn_to_what_is_usual():
    rewards = np.array([1.0, *[-1.0] * 50, *[1.0] * 50])
    kind_of = np.array([1, *[0] * 100])
    assert advantages(rewards, kind_of, prior=8)[0] > 0.8, "one approval says nothing yet about its kind"
    assert advantages(rewards, kind_of, prior=0)[0] == 0, "the control"


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.05, 2)), min_size=1, max_size=60), st.floats(0.2, 0.5))
def test_nobody_counts_more_than_the_cap(given_, cap):
    opinions, worth = [(person,) for person, _ in given_], np.array([value for _, value in given_])
    weights = cap_people(opinions, worth, cap)
    assert ((weights > 0) & (weights <= 1)).all()
    people = {person for (person,) in opinions}
    total = float((weights * worth).sum())
    shares = [sum(w * v for w, v, (who,) in zip(weights, worth, opinions, strict=True) if who == one) for one in people]
    if len(people) >= 1 / cap:
        assert max(shares) <= cap * total * 1.01
    else:
        assert (weights == 1).all(), "there is nobody to be outvoted"


def test_one_voice_is_held_back_and_the_others_are_not():
    crowd = [("raider",)] * 500 + [(f"person{number}",) for number in range(12)]
    weights = cap_people(crowd, np.ones(len(crowd)), cap=0.25)
    assert weights[:500].sum() == pytest.approx(4, rel=0.01), (
        "a quarter of all, where twelve others have said one thing each"
    )
    assert (weights[500:] == 1).all()


@given(st.lists(st.sets(st.sampled_from("abcde"), min_size=1), min_size=1, max_size=30), st.floats(0.2, 0.5))
def test_a_cap_that_cannot_be_kept_leaves_something_to_learn_from(others, cap):
    everywhere = [("voice", *sorted(those)) for those in others]  # somebody speaks wherever others do
    weights = cap_people(everywhere, np.ones(len(everywhere)), cap)
    assert weights.max() == 1
    assert (weights >= 0).all()


def test_of_what_one_person_says_again_and_again_the_newest_counts():
    said = [experience(f"turn{number}") for number in range(5)]
    said += [experience("turn5", asker="bob"), experience("turn6", reward=-1.0)]
    alike = np.tile([1.0, 0.0], (7, 1))
    kept, dropped = drop_near_duplicates(said, alike)
    assert [one.turn_id for one in kept] == ["turn4", "turn5", "turn6"]
    assert sum(dropped.values()) == 4
    apart = np.eye(7)
    assert drop_near_duplicates(said, apart)[0] == said, "the control: other texts are all kept"


def test_old_experiences_are_drawn_beside_the_newest_and_stay_drawn():
    said = [experience(f"{number:04}") for number in range(100)]
    kept, dropped = draw_fresh_and_old(said, limit=20, fresh=0.5)
    names = [one.turn_id for one in kept]
    assert names == sorted(names)
    assert names[-10:] == [f"{number:04}" for number in range(90, 100)]
    assert sum(dropped.values()) == 80
    more = [one.turn_id for one in draw_fresh_and_old([*said, experience("0100")], 20, 0.5)[0]]
    assert len(set(names[:10]) & set(more[:10])) >= 9
    assert draw_fresh_and_old(said, 100, 0.5) == (said, {})


def test_prompts_of_one_kind_are_found():
    rng = np.random.default_rng(0)
    centres = np.eye(3)[rng.integers(3, size=120)]
    vectors = centres + rng.normal(0, 0.05, centres.shape)
    told = dict(zip(map(str, range(120)), vectors / np.linalg.norm(vectors, axis=1, keepdims=True), strict=True))
    embedder = SimpleNamespace(encode=lambda texts: np.array([told[text] for text in texts]))
    found = cluster_questions(list(told), embedder, seed=0)
    assert len(set(found)) == 5
    assert all(len({int(np.argmax(row)) for row in centres[found == kind]}) == 1 for kind in set(found))
    assert (cluster_questions(list(told)[:30], embedder, seed=0) == 0).all(), "too few to tell kinds apart"
    assert (cluster_questions(list(told), None, seed=0) == 0).all()


def test_the_share_that_is_held_out_is_about_what_was_asked_for():
    share = sum(is_held_out(str(number), 0.25) for number in range(4000)) / 4000
    assert share == pytest.approx(0.25, abs=0.02)


def test_the_best_answer_to_a_question_is_preferred_to_the_worst():
    bad, good = experience("a", -1.0, completion_ids=(5,)), experience("b", 1.0, completion_ids=(6,))
    first, second = pair_best_with_worst([(0.0, bad), (0.0, good)])
    assert (first.rejected_ids, second.rejected_ids) == (None, (5,))
    ranked = pair_best_with_worst([(-1.0, replace(bad, reward=1.0)), (-2.0, good)])
    assert ranked[0].rejected_ids == (6,), "where rewards are equal people's ranks tell"
    assert all(one.rejected_ids is None for one in pair_best_with_worst([(0.0, good), (0.0, replace(good, turn_id="c"))]))
    assert all(one.rejected_ids is None for one in pair_best_with_worst([(0.0, bad), (0.0, replace(good, prompt_ids=(9,)))]))


def test_what_is_weighed_has_equal_weight_on_both_sides():
    said = [experience(str(number), 1.0 if number < 30 else -1.0) for number in range(40)]
    worth = [one.advantage for one in assign_advantages(said, np.zeros(40, int), prior=0.0, cap=1.0)]
    assert sum(worth) == pytest.approx(0)
    assert worth[0] == pytest.approx(0.5)
    assert worth[-1] == pytest.approx(-1.5)


def test_smoothing_takes_the_place_of_a_share_of_each_advantage():
    said = [experience(str(row), (-1.0, 1.0)[row % 2], answer=("Well.", "Well?")[row % 2]) for row in range(40)]
    said[0] = replace(said[0], reward=1.0)  # a mistake
    plain, some, all_of_it = (
        [one.advantage for one in with_advantages(said, None, RewardsConfig(smoothing=share), seed=0)]
        for share in (0, 0.5, 1)
    )
    assert plain[0] > 0 > all_of_it[0]
    assert some == pytest.approx([(one + other) / 2 for one, other in zip(plain, all_of_it, strict=True)])


def test_a_correction_and_what_it_corrects_keep_what_was_said_of_them():
    said = [experience(str(row), (-1.0, 1.0)[row % 2], answer=("No.", "You?")[row % 2]) for row in range(40)]
    said += [experience("corrected", -0.5, prompt_ids=(9,), completion_ids=(7,), answer="You?")]
    said += [experience("correction", 1.0, prompt_ids=(9,), completion_ids=(8,), rejected_ids=(7,), answer="No.")]
    found = with_advantages(said, None, RewardsConfig(smoothing=1.0), seed=0)
    plain = with_advantages(said, None, RewardsConfig(), seed=0)
    assert [one.advantage for one in found[-2:]] == [one.advantage for one in plain[-2:]]
    assert found[0].advantage != plain[0].advantage, "the control"


def test_nobody_counts_more_than_the_cap_after_smoothing_either():
    rng = np.random.default_rng(0)
    texts = ["Well?", "Well, well.", "Yes, you did it!", "no"]
    said = [
        experience(
            f"{person} {row}", float(rng.choice([1, -1])), opinion_holders=(person,), answer=texts[int(rng.integers(4))]
        )
        for person, count in (("ann", 300), *((f"p{number}", 10) for number in range(8)))
        for row in range(count)
    ]
    found = with_advantages(said, None, RewardsConfig(smoothing=0.9), seed=0)
    counts = {
        name: sum(abs(one.advantage) * one.weight for one in found if one.opinion_holders == (name,))
        for name in ("ann", "p0")
    }
    assert counts["ann"] <= 0.2501 * sum(abs(one.advantage) * one.weight for one in found)
    assert counts["p0"] > 0


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))
def test_batches_hold_every_row_equally_often_and_none_twice(count, batch, steps, seed):
    order = draw_batches(count, batch, steps, random.Random(seed))
    assert len(order) == steps * batch
    often = [Counter(order)[row] for row in range(count)]
    assert max(often) - min(often) <= 1
    assert order == draw_batches(count, batch, steps, random.Random(seed)), "the same seed draws the same"
    if batch <= count:
        assert all(len({*order[start : start + batch]}) == batch for start in range(0, len(order), batch))


def test_each_epoch_has_an_order_of_its_own():
    order = draw_batches(40, 8, 10, random.Random(0))
    assert sorted(order[:40]) == sorted(order[40:]) == list(range(40))
    assert order[:40] != order[40:]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 8))
def test_what_is_grouped_by_length_is_the_same_rows(lengths, batch):
    order = list(range(len(lengths)))
    assert sorted(group_by_length(order, lengths, batch)) == order
