"""Labels of a reward head, on the toy policy: they move its own answers to the taste that the head was taught."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from bot.config import Config, load
from learning.bench import simulated_people
from learning.data.experience import Experience
from learning.data.feature_space import FeatureExtractor
from learning.judging.evaluation import Sample, generate
from learning.judging.metrics import Check, DistillationMetrics, TrainingMetrics
from learning.models import toy
from learning.models.trainable import copy_weights, load_for_training, restore_weights
from learning.training import distillation
from learning.training.distillation import USUAL, choose_training, distil, is_proven, label_answers
from learning.training.objectives import train

PROMPTS, ANSWERS = 24, USUAL.answers


@pytest.fixture(scope="module")
def settings(demo_model) -> Config:
    return load(policy={"model": demo_model}, learning={"distil_prompts": PROMPTS, "distil_rate": 4.0}, gate={"samples": 8})


@pytest.fixture(scope="module")
def model(settings, demo_model):
    return load_for_training(settings.policy, settings.serving, settings.training, demo_model)


@pytest.fixture
def fresh(model) -> Iterator[object]:
    """The demo policy with an adapter that changes nothing yet."""
    start = copy_weights(model)
    yield model
    restore_weights(model, start)


def judge(count: int, *, is_by_lot: bool = False) -> list[Experience]:
    """Return answers that people judged: they like those with an emoji, or by lot."""
    rng = random.Random(0)
    found = []
    for number in range(count):
        style = rng.choice(toy.STYLES)
        prompt, intent = rng.choice(toy.list_prompts())
        likes = rng.random() < 0.5 if is_by_lot else style.emoji
        one = Experience(f"turn {number}", prompt, (), (), None, 1.0 if likes else -1.0, (), question=prompt)
        found.append(replace(one, answer=toy.compose_answer(intent, style), opinion_holders=(f"person {number % 5}",)))
    return found


def spell(tokenizer, prompts) -> list[tuple[int, ...]]:
    return [tuple(tokenizer.prompt_ids([{"role": "user", "content": text}])) for text, _ in prompts]


@pytest.fixture(scope="module")
def said(tokenizer) -> list[tuple[int, ...]]:
    """The token ids of the prompts that people say."""
    return spell(tokenizer, random.Random(1).sample(toy.list_prompts(), PROMPTS))


@pytest.fixture(scope="module")
def labels(model, settings, tokenizer, said) -> list[Experience]:
    return label_answers(settings, model, tokenizer, judge(30), said, FeatureExtractor(None))


def measure_utility(model, tokenizer) -> float:
    """The share of answers to held-out prompts that people would like."""
    prompts = spell(tokenizer, toy.list_held_out_prompts()) * 8
    answers = generate(model, tokenizer, prompts, 48, seed=7)
    return float(np.mean([simulated_people.emoji("", one.text) > 0 for one in answers]))


def test_only_a_head_that_was_proven_labels_anything(settings):
    assert is_proven(settings, judge(40), None)
    assert not is_proven(settings, judge(40, is_by_lot=True), None), "the control"
    assert not is_proven(settings, judge(8), None)
    assert not is_proven(settings, [], None)
    off = settings.model_copy(update={"learning": settings.learning.model_copy(update={"distil_prompts": 0})})
    assert not is_proven(off, judge(40), None)


def test_a_label_compares_an_answer_with_the_others_to_its_prompt(labels, said):
    assert len(labels) == PROMPTS * ANSWERS
    groups = [labels[start : start + ANSWERS] for start in range(0, len(labels), ANSWERS)]
    assert [{one.prompt_ids for one in group} for group in groups] == [{prompt} for prompt in said]
    assert all(sum(one.advantage for one in group) == pytest.approx(0, abs=1e-9) for group in groups)
    for group in groups:
        liked = [simulated_people.emoji("", one.answer) > 0 for one in group]
        if any(liked) and not all(liked):
            best = max(group, key=lambda one: one.advantage)
            assert simulated_people.emoji("", best.answer) > 0
    assert all(len(one.logprobs) == len(one.completion_ids) for one in labels)
    assert {one.feedback_ids for one in labels} == {()}, "nobody said it"


def test_the_same_seed_gives_the_same_labels_and_another_seed_others(model, settings, tokenizer, said, labels):
    told = model, tokenizer, judge(30), said[:4], FeatureExtractor(None)
    once, again, other = (label_answers(settings.model_copy(update={"seed": seed}), *told) for seed in (0, 0, 1))
    assert again == once
    assert [one.completion_ids for one in other] != [one.completion_ids for one in once]
    fewer = settings.model_copy(update={"learning": settings.learning.model_copy(update={"distil_prompts": 2})})
    assert len(label_answers(fewer, *told)) == 2 * ANSWERS


def test_labels_move_the_policys_own_answers_to_the_taste_and_shuffled_ones_do_not(fresh, settings, tokenizer, labels):
    start, before = copy_weights(fresh), measure_utility(fresh, tokenizer)
    shuffled = random.Random(0).sample([one.advantage for one in labels], len(labels))
    by_lot = [replace(one, advantage=advantage) for one, advantage in zip(labels, shuffled, strict=True)]
    steps, after = choose_training(settings.training, settings.learning.distil_rate), {}
    for name, rows in {"taught": labels, "by lot": by_lot}.items():
        figures = train(fresh, tokenizer.hf, rows, steps, 0, lambda *_: None)
        assert 0 < figures.steps <= distillation.STEPS
        after[name] = measure_utility(fresh, tokenizer)
        restore_weights(fresh, start)
    assert after["taught"] > before + 0.15
    assert after["by lot"] == pytest.approx(before, abs=0.15)


def test_answers_that_are_all_alike_have_no_labels(model, settings, tokenizer, said, monkeypatch):
    ids = tuple(tokenizer.completion_ids("Hey there! 👋"))

    def say_the_same(model, tokenizer, prompts, *_):
        return [Sample(tuple(prompt), ids, "Hey there! 👋", is_finished=True) for prompt in prompts]

    monkeypatch.setattr(distillation, "generate", say_the_same)
    assert label_answers(settings, model, tokenizer, judge(30), said[:2], FeatureExtractor(None)) == []
    assert label_answers(settings, model, tokenizer, judge(8), said[:2], FeatureExtractor(None)) == [], (
        "nor does a head that is none"
    )


@pytest.mark.parametrize("spoilt", ["", "unfinished", "unlikely"])
def test_a_malformed_answer_and_one_that_the_base_would_hardly_give_count_as_disliked(
    model, settings, tokenizer, said, monkeypatch, spoilt
):
    plain, lively = "Hey there!", "Hey there! 👋"

    def say_emoji_once(model, tokenizer, prompts, *_):
        found = []
        for number, prompt in enumerate(prompts):
            text = plain if number % ANSWERS else lively
            ids = tuple(tokenizer.completion_ids(text))
            ids = ids[::-1] if spoilt == "unlikely" and text == lively else ids
            found.append(Sample(tuple(prompt), ids, text, is_finished=spoilt != "unfinished" or text == plain))
        return found

    monkeypatch.setattr(distillation, "generate", say_emoji_once)
    labelled = label_answers(settings, model, tokenizer, judge(30), said[:2], FeatureExtractor(None))
    assert any(one.advantage > 0 for one in labelled if one.answer == lively) == (not spoilt)


@pytest.mark.parametrize(("kl", "harm"), [(0.0, None), (0.2, None), (0.0, "kept"), (0.0, "undone"), (0.0, "undone once")])
def test_the_distance_from_the_base_decides_how_many_rounds_there_are_and_one_that_harms_is_the_last(
    fresh, settings, tokenizer, said, kl, harm
):
    start, answers, rates, holds, moved = copy_weights(fresh), [], [], [], []

    def has_moved() -> bool:
        return any(bool((value != start[name]).any()) for name, value in copy_weights(fresh).items())

    def teach(config: Config, rows: list[Experience]) -> TrainingMetrics:
        assert config.training.objective == "pg"
        answers.append([one.completion_ids for one in rows])
        rates.append(config.training.learning_rate / settings.training.learning_rate)
        holds.append(config.training.anchor / (distillation.ANCHOR * settings.training.anchor))
        moved.append(has_moved())
        short = config.training.model_copy(update={"max_steps": 3})
        figures = train(fresh, tokenizer.hf, rows, short, config.seed, lambda *_: None)
        harms = harm in ("kept", "undone") or (harm == "undone once" and len(rates) == 1)
        told = Check(liked=None, kl=kl, well_formed=1, samples=1, gained=None, step=3)
        return figures | TrainingMetrics(stopped="it harms" if harms else None, kept=int(harm == "kept"), checks=[told])

    fewer = settings.model_copy(update={"learning": settings.learning.model_copy(update={"distil_prompts": 2})})
    found = distil(fewer, fresh, tokenizer, judge(30), said, None, teach)
    size, stopped = 2 * ANSWERS, "it harms" if harm in ("kept", "undone") else None
    match harm:
        case "kept":
            assert rates == [4.0]
        case "undone":  # the same answers again, at lower rates
            assert rates == [4.0, 2.0, 1.0]
            assert answers[0] == answers[1] == answers[2]
            assert moved == [False] * 3
        case "undone once":
            assert rates == [4.0, *[2.0] * USUAL.rounds]
            assert answers[0] == answers[1] != answers[2]
        case _:
            assert rates == [4.0] * (distillation.LEAST_ROUNDS if kl else USUAL.rounds)
            assert answers[0] != answers[1]
            assert moved == [False, *[True] * (len(rates) - 1)]
    assert holds == pytest.approx([1.0, kl / (distillation.NEAR * settings.gate.kl_budget)] if kl else [1.0] * len(rates))
    rounds = len({tuple(map(tuple, one)) for one in map(tuple, answers)})
    assert found == DistillationMetrics(labels=size * rounds, labels_stopped=stopped)
    assert has_moved() == (harm != "undone")
    assert distil(fewer, fresh, tokenizer, judge(8), said, None, teach) == DistillationMetrics(labels=0, labels_stopped=None)
