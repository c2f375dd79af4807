"""The model that a run trains: whole weights beside the base that they are held to, and what becomes of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bot.config import Config
from learning.benchmark import random_version
from learning.evaluation import answer_logprobs
from learning.model import adopt, as_base, draw_to_base, load, not_finite, restore, save, served, settle, weights

FULL = Config(training={"weights": "full"})


@pytest.fixture(scope="module")
def rows(tokenizer):
    prompt = tokenizer.prompt_ids([{"role": "user", "content": "hello"}])
    return [(prompt, tokenizer.completion_ids(text)) for text in ("Hey!", "Hello, how are you today?")]


def told(model, rows) -> torch.Tensor:
    return torch.cat(answer_logprobs(model, rows))


def moved(model, scale: float = 0.02) -> None:
    torch.manual_seed(0)
    for value in model.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn_like(value), alpha=scale)


def test_whole_weights_are_beside_those_of_the_base(demo_model, rows):
    model, base = load(FULL, demo_model), told(AutoModelForCausalLM.from_pretrained(demo_model), rows)
    moved(model)
    own = told(model, rows)
    assert not torch.allclose(own, base, atol=1e-2), "the control"
    with as_base(model):
        assert torch.equal(told(model, rows), base)
    assert torch.equal(told(model, rows), own)
    with pytest.raises(RuntimeError), as_base(model):
        raise RuntimeError
    assert torch.equal(told(model, rows), own), "also where something went wrong inside"


def test_all_is_trained_but_the_embeddings(demo_model):
    model = load(FULL, demo_model)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}, "the output layer is tied to it"
    assert set(weights(model)) == set(model.base_weights)


def test_whole_weights_go_on_from_an_adapter_and_from_whole_ones(demo_model, tmp_path, rows):
    random_version(Config(), demo_model, tmp_path / "adapter", seed=0)
    merged = load(FULL, demo_model, str(tmp_path / "adapter"))
    as_served = told(served(FULL, demo_model, str(tmp_path / "adapter")), rows)
    assert torch.allclose(told(merged, rows), as_served, atol=1e-4)
    moved(merged)
    save(merged, tmp_path / "whole")
    again = load(FULL, demo_model, str(tmp_path / "whole"))
    assert torch.equal(told(again, rows), told(merged, rows))
    base = told(served(FULL, demo_model), rows)
    for model in (merged, again):
        with as_base(model):
            assert torch.equal(told(model, rows), base), "the base stays the base"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_was_taught_elsewhere_is_taken_over(demo_model, tmp_path, rows, kind):
    config = Config(training={"weights": kind})
    taught, here = load(config, demo_model), load(config, demo_model)
    moved(taught)
    assert not torch.allclose(told(here, rows), told(taught, rows), atol=1e-3)
    save(taught, tmp_path)
    adopt(here, tmp_path)
    assert torch.equal(told(here, rows), told(taught, rows))


def test_weights_are_drawn_to_the_base_by_a_share_of_the_way(demo_model):
    model = load(FULL, demo_model)
    start = weights(model)
    moved(model)
    away = {name: value - start[name] for name, value in weights(model).items()}
    draw_to_base(model, 0.25)
    for name, value in weights(model).items():
        assert torch.allclose(value, start[name] + 0.75 * away[name], atol=1e-6)
    restore(model, start)
    draw_to_base(model, 0.25)
    assert all(torch.allclose(value, start[name]) for name, value in weights(model).items())


def test_what_is_measured_is_what_is_served_also_in_sixteen_bits(demo_model, tmp_path, rows):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).save_pretrained(base)
    model = load(FULL, str(base))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    moved(model)
    trained = told(model, rows)
    settle(model)
    assert not torch.equal(told(model, rows), trained), "the control: the numbers are not the same"
    save(model, tmp_path)
    assert torch.equal(told(served(FULL, str(base), str(tmp_path)), rows), told(model, rows))
    with as_base(model):
        assert torch.equal(told(model, rows), told(served(FULL, str(base)), rows))


def test_a_weight_that_is_no_number_is_named(demo_model):
    model = load(FULL, demo_model)
    assert not_finite(model) == []
    model.model.norm.weight.data[3] = float("nan")
    assert not_finite(model) == ["model.norm.weight"]
