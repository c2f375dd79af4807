"""Generation in a batch that gets smaller: the answers are those of whole batches, and most of the work is not done."""

import pytest

from learning.judging.evaluation import generate, generate_greedily
from learning.models import generation, toy
from learning.models.trainable import load_served


@pytest.fixture
def counted(config, demo_model, monkeypatch):
    """Return the toy, and a list that gets the rows of each of its steps."""
    model = load_served(config.policy, config.serving, demo_model)
    rows: list[int] = []
    forward = model.forward

    def count(*args, **given):
        rows.append(len(given["input_ids"]))
        return forward(*args, **given)

    monkeypatch.setattr(model, "forward", count)
    return model, rows


@pytest.fixture
def prompts(tokenizer):
    """Return prompts of different lengths that begin alike and are answered at different lengths."""
    told = [text for text, _ in toy.list_prompts()[:32]]
    return [
        tokenizer.prompt_ids([{"role": "user", "content": "well. " * (number % 3) + text}])
        for number, text in enumerate(told)
    ]


def test_a_batch_that_gets_smaller_gives_the_answers_of_whole_ones_with_less_work(counted, tokenizer, prompts, monkeypatch):
    model, rows = counted
    found = generate_greedily(model, tokenizer, prompts, 64)
    work = sum(rows)
    rows.clear()
    monkeypatch.setattr(generation, "FEW", len(prompts))  # the control
    assert generate_greedily(model, tokenizer, prompts, 64) == found
    assert len({len(one.completion_ids) for one in found}) > 4, "their lengths differ"
    assert work < 0.8 * sum(rows)


def test_answers_that_do_not_end_are_as_long_as_they_may_be(counted, tokenizer, prompts):
    model, _ = counted
    found = generate(model, tokenizer, prompts, 6, seed=0)
    assert {len(one.completion_ids) for one in found if not one.is_finished} == {6}
    assert {one.is_finished for one in found} == {True, False}
    assert generate(model, tokenizer, prompts, 6, seed=0) == found, "the same seed gives the same answers"
    assert generate(model, tokenizer, prompts, 6, seed=1) != found


def test_one_prompt_and_none(counted, tokenizer, prompts):
    model, _ = counted
    [one] = generate(model, tokenizer, prompts[:1], 64, seed=0)
    assert one.is_finished
    assert generate(model, tokenizer, [], 64, seed=0) == []
