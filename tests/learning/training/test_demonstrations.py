"""Corrections that are preferred to the policy's own answers: which rows they give, and what these teach."""

from dataclasses import replace

import numpy as np
import pytest

from bot.config import Config, load
from learning.data.experience import Experience
from learning.judging.evaluation import batched_logprobs, generate, token_rows
from learning.models.trainable import copy_weights, load_for_training, restore_weights
from learning.training.demonstrations import NEWEST, prefer_to_own_answers
from learning.training.objectives import train

PROMPTS = ("hello", "what do you like?", "i am tired", "tell me something", "good morning", "how are you?")
WISH = "Well, 2 plus 2 is 4."


@pytest.fixture(scope="module")
def settings(demo_model) -> Config:
    return load(policy={"model": demo_model}, learning={"own_answers": 3})


@pytest.fixture(scope="module")
def model(settings, demo_model):
    return load_for_training(settings.policy, settings.serving, settings.training, demo_model)


@pytest.fixture(scope="module")
def corrections(tokenizer) -> list[Experience]:
    """Answers that nobody liked, and what people wrote in place of each."""
    found = []
    for number, text in enumerate(PROMPTS):
        ids = tuple(tokenizer.prompt_ids([{"role": "user", "content": text}]))
        bad, wish = (tuple(tokenizer.completion_ids(one)) for one in ("Hey there!", WISH))
        disliked = Experience(f"turn {number}", text, ids, bad, None, -0.5, (f"edit {number}",), advantage=-0.5)
        wanted = replace(disliked, completion_ids=wish, rejected_ids=bad, reward=1.0, advantage=0.8, is_correction=True)
        found += [disliked, wanted]
    return found


def test_a_correction_is_preferred_to_answers_of_the_policy_and_of_its_base(settings, model, tokenizer, corrections):
    rows = prefer_to_own_answers(settings, model, tokenizer, corrections)
    assert 2 * 3 * len(PROMPTS) * 0.8 < len(rows) <= 2 * 3 * len(PROMPTS)
    for wanted in corrections[1::2]:
        mine = [one for one in rows if one.prompt_ids == wanted.prompt_ids]
        assert {one.feedback_ids for one in mine} == {wanted.feedback_ids}, "who wrote it can be forgotten"
        assert len({one.completion_ids for one in mine}) > 1
        assert wanted.completion_ids not in {one.completion_ids for one in mine}
        assert 0 > sum(one.advantage for one in mine) >= -wanted.advantage - 1e-9
        assert not any(one.is_correction or one.rejected_ids for one in mine)


def test_pairs_share_the_weight_of_their_correction(settings, model, tokenizer, corrections):
    pairwise = settings.model_copy(update={"training": settings.training.model_copy(update={"objective": "dpo"})})
    rows = prefer_to_own_answers(pairwise, model, tokenizer, corrections)
    assert {one.completion_ids for one in rows} == {one.completion_ids for one in corrections[1::2]}
    assert all(one.rejected_ids not in (None, one.completion_ids) for one in rows)
    for wanted in corrections[1::2]:
        assert 0 < sum(one.weight for one in rows if one.prompt_ids == wanted.prompt_ids) <= 1 + 1e-9


def test_without_corrections_or_own_answers_there_are_no_rows(settings, model, tokenizer, corrections):
    off = settings.model_copy(update={"learning": settings.learning.model_copy(update={"own_answers": 0})})
    assert prefer_to_own_answers(off, model, tokenizer, corrections) == []
    assert prefer_to_own_answers(settings, model, tokenizer, corrections[::2]) == []
    assert prefer_to_own_answers(settings, model, tokenizer, []) == []


def test_only_the_newest_corrections_are_answered_again(settings, model, tokenizer, corrections):
    few = settings.model_copy(update={"learning": settings.learning.model_copy(update={"own_answers": 1})})
    many = [replace(corrections[1], turn_id=f"turn {number}") for number in range(NEWEST + 8)]
    assert {one.turn_id for one in prefer_to_own_answers(few, model, tokenizer, many)} <= {one.turn_id for one in many[8:]}


def test_the_same_seed_gives_the_same_rows(settings, model, tokenizer, corrections):
    def make(seed: int) -> list[Experience]:
        return prefer_to_own_answers(settings.model_copy(update={"seed": seed}), model, tokenizer, corrections)

    assert make(0) == make(0) != make(1)


@pytest.mark.parametrize("objective", ["kto", "dpo", "pg"])
def test_they_set_what_people_wrote_further_above_the_policys_own_answers_than_corrections_alone_do(
    settings, model, tokenizer, corrections, objective
):
    """Measured on fresh answers to the corrected prompts."""
    training = settings.training.model_copy(update={"objective": objective})
    config = settings.model_copy(update={"training": training})
    start = copy_weights(model)
    prompts = [list(one.prompt_ids) for one in corrections[1::2] for _ in range(8)]
    usual, wanted = token_rows(generate(model, tokenizer, prompts, 48, seed=9)), token_rows(corrections[1::2])
    rows = prefer_to_own_answers(config, model, tokenizer, corrections)

    def measure() -> float:
        wish, own = (np.mean([float(row.mean()) for row in batched_logprobs(model, rows)]) for rows in (wanted, usual))
        return float(wish - own)

    before, after = measure(), {}
    for name, given in {"alone": corrections, "preferred": [*rows, *corrections]}.items():
        train(model, tokenizer.hf, given, training, 0, lambda *_: None)
        after[name] = measure()
        restore_weights(model, start)
    assert after["preferred"] > after["alone"] + 0.2
    assert after["alone"] > before, "the control"
