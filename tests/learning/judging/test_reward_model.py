"""The reward model: it finds what people like where there is something to find, and says so where there is not."""

import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold

from bot.config import TrainingConfig
from learning.data.experience import Experience
from learning.judging.lm_reward_model import LmRewardModel, make_pairs
from learning.judging.reward_model import RewardModel
from learning.judging.reward_scores import ScoredAnswers, calibrate_scores, score
from learning.judging.statistics import accuracy, calibration
from learning.models import toy

ABOUT = {
    "cats": ["my cat sleeps all day", "kittens love to play with wool", "a cat purrs when it is happy", "cats hate water"],
    "taxes": [
        "file your tax return by may",
        "income tax is due every year",
        "keep receipts for the tax office",
        "tax rates rose",
    ],
}


def rated(likes, seed: int = 0) -> list[Experience]:
    rng = random.Random(seed)
    found = []
    for number in range(160):
        about = rng.choice(sorted(ABOUT))
        text = f"{rng.choice(ABOUT[about])}, {rng.choice(['you know', 'they say', 'i think', 'as it happens'])}"
        worth = 1.0 if likes(about, rng) else -1.0
        found.append(Experience(str(number), str(number // 2), (), (), None, worth, (), question="tell me", answer=text))
    return found


def test_what_people_like_is_found_on_conversations_that_were_not_seen(embedder):
    model = RewardModel(embedder, seed=0)
    judged = model.fit(rated(lambda about, rng: (about == "cats") != (rng.random() < 0.1)))
    found = score(judged, seed=0)
    assert found.reward_model_auc_low > 0.75
    assert found.reward_model_calibration_error < 0.1
    cat, tax = model.predict_chances(
        [
            Experience("", "", (), (), None, 0.0, (), question="tell me", answer=text)
            for text in ("the cat chased a mouse", "the tax office wrote again")
        ]
    )
    assert cat > 0.7 > 0.3 > tax


@pytest.mark.slow
def test_where_there_is_nothing_to_find_it_finds_nothing(embedder):
    model = RewardModel(embedder, seed=0)
    found = [score(model.fit(rated(lambda about, rng: rng.random() < 0.5, seed)), seed=0) for seed in range(6)]
    assert sum(one.reward_model_auc for one in found) / 6 == pytest.approx(0.5, abs=0.1)


def test_too_few_answers_of_a_kind_are_not_judged(embedder):
    assert RewardModel(embedder, seed=0).fit(rated(lambda about, rng: rng.random() < 0.05)) is None


def test_folds_with_different_shares_of_liked_answers_do_not_change_how_a_model_ranks_them():
    ranked, calibrated = [], []
    for seed in range(12):
        found, rng = rated(lambda about, rng: rng.random() < 0.5, seed), np.random.default_rng(seed)
        judged, _ = calibrate_scores(rng.normal(size=len(found)), found, GroupKFold(5, shuffle=True, random_state=seed))
        ranked.append(score(judged, seed=0, draws=10).reward_model_auc)
        calibrated.append(accuracy(judged.chances, np.where(judged.liked, 1, -1)))
    assert np.mean(ranked) == pytest.approx(0.5, abs=0.04)
    assert np.mean(calibrated) < 0.46, "the control: by their chances, answers of such folds are ranked the wrong way round"


def test_the_calibration_curve_names_each_bin():
    judged = ScoredAnswers(
        scores=np.array([-3.0, -2.0, -2.0, 4.0]),
        chances=np.array([0.05, 0.15, 0.15, 1.0]),
        liked=np.array([False, True, False, True]),
        units=list("abcd"),
        words=np.array([1, 2, 3, 4]),
    )
    assert calibration(judged.chances, judged.liked) == [(0.05, 0.0, 1), (0.15, 0.5, 2), (1.0, 1.0, 1)]


def words_of(tokenizer, likes, count: int = 288, seed: int = 0) -> list[Experience]:
    """Answers of the demo set, each judged by whether it has an emoji."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt, intent = rng.choice(toy.list_prompts())
        style = rng.choice(toy.STYLES)
        ids = tuple(tokenizer.prompt_ids([{"role": "user", "content": prompt}]))
        answer = toy.compose_answer(intent, style)
        worth = 1.0 if likes(style, rng) else -1.0
        row = Experience(str(number), str(number), ids, tuple(tokenizer.completion_ids(answer)), None, worth, ())
        found.append(replace(row, question=prompt, answer=answer))
    return found


@pytest.mark.slow
def test_the_base_model_with_a_head_learns_what_people_like_and_nothing_from_chance(demo_model, tokenizer):
    model = LmRewardModel(demo_model, TrainingConfig(), seed=0)
    judged = model.fit(words_of(tokenizer, lambda style, rng: style.emoji))
    assert score(judged, seed=0).reward_model_auc_low > 0.7
    plain, lively = (
        [one for one in words_of(tokenizer, lambda style, rng: style.emoji, seed=1) if (one.reward > 0) == emoji]
        for emoji in (False, True)
    )
    assert 1 > model.predict_chances(lively).mean() > model.predict_chances(plain).mean() > 0
    chance = LmRewardModel(demo_model, TrainingConfig(), seed=0).fit(
        words_of(tokenizer, lambda style, rng: rng.random() < 0.5)
    )
    control = score(chance, seed=0)
    assert control.reward_model_auc_low < 0.5 < control.reward_model_auc_high
    assert model.fit(words_of(tokenizer, lambda style, rng: style.emoji, count=20)) is None


def test_each_answer_is_beside_one_of_the_other_kind_to_the_same_prompt_where_there_is_one():
    def row(prompt: int, answer: int, worth: float) -> Experience:
        return Experience("", "", (prompt,), (answer,), None, worth, ())

    found = make_pairs([row(1, 11, 1.0), row(1, 12, -1.0), row(2, 21, 1.0)], random.Random(0))
    assert found[:2] == [{"chosen_ids": [1, 11], "rejected_ids": [1, 12]}] * 2
    assert found[2] == {"chosen_ids": [2, 21], "rejected_ids": [1, 12]}
