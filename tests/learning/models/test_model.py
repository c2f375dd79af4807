"""The model that a run trains: whole weights beside the base that they are held to, and what becomes of them."""

import shutil
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from trl.trainer import add_fused_lm_head

from bot.config import Config
from bot.errors import TrainingError
from learning.bench.swap import save_random_version
from learning.judging.evaluation import answer_logprobs
from learning.models.trainable import (
    as_base,
    as_float32,
    cast_for_serving,
    copy_weights,
    divide_logits,
    draw_to_base,
    find_not_finite,
    load_for_training,
    load_served,
    load_state,
    restore_weights,
    save,
)

FULL = Config(training={"weights": "full"})
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}


def load_trainable(config: Config, base_model: str, version: str | None = None) -> Any:
    return load_for_training(config.policy, config.serving, config.training, base_model, version)


def load_as_served(config: Config, base_model: str, version: str | None = None) -> Any:
    return load_served(config.policy, config.serving, base_model, version)


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
    model, base = load_trainable(FULL, demo_model), told(AutoModelForCausalLM.from_pretrained(demo_model), rows)
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
    model = load_trainable(FULL, demo_model)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"model.embed_tokens.weight"}, "the output layer is tied to it"
    assert set(copy_weights(model)) == set(model.base_weights)


def test_whole_weights_go_on_from_an_adapter_and_from_whole_ones(demo_model, tmp_path, rows):
    save_random_version(Config(), demo_model, tmp_path / "adapter", seed=0)
    merged = load_trainable(FULL, demo_model, str(tmp_path / "adapter"))
    as_served = told(load_as_served(FULL, demo_model, str(tmp_path / "adapter")), rows)
    assert torch.allclose(told(merged, rows), as_served, atol=1e-4)
    moved(merged)
    save(merged, tmp_path / "whole")
    again = load_trainable(FULL, demo_model, str(tmp_path / "whole"))
    assert torch.equal(told(again, rows), told(merged, rows))
    base = told(load_as_served(FULL, demo_model), rows)
    for model in (merged, again):
        with as_base(model):
            assert torch.equal(told(model, rows), base), "the base stays the base"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_was_taught_elsewhere_is_taken_over(demo_model, tmp_path, rows, kind):
    config = Config(training={"weights": kind})
    taught, here = load_trainable(config, demo_model), load_trainable(config, demo_model)
    moved(taught)
    assert not torch.allclose(told(here, rows), told(taught, rows), atol=1e-3)
    save(taught, tmp_path)
    load_state(here, tmp_path)
    assert torch.equal(told(here, rows), told(taught, rows))


def test_weights_are_drawn_to_the_base_by_a_share_of_the_way(demo_model):
    model = load_trainable(FULL, demo_model)
    start = copy_weights(model)
    moved(model)
    away = {name: value - start[name] for name, value in copy_weights(model).items()}
    draw_to_base(model, 0.25)
    for name, value in copy_weights(model).items():
        assert torch.allclose(value, start[name] + 0.75 * away[name], atol=1e-6)
    restore_weights(model, start)
    draw_to_base(model, 0.25)
    assert all(torch.allclose(value, start[name]) for name, value in copy_weights(model).items())


def test_what_is_measured_is_what_is_served_also_in_sixteen_bits(demo_model, tmp_path, rows):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).save_pretrained(base)
    model = load_trainable(FULL, str(base))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    moved(model)
    trained = told(model, rows)
    cast_for_serving(model)
    assert not torch.equal(told(model, rows), trained), "the control: the numbers are not the same"
    save(model, tmp_path)
    assert torch.equal(told(load_as_served(FULL, str(base), str(tmp_path)), rows), told(model, rows))
    with as_base(model):
        assert torch.equal(told(model, rows), told(load_as_served(FULL, str(base)), rows))


def test_a_weight_that_is_no_number_is_named(demo_model):
    model = load_trainable(FULL, demo_model)
    assert find_not_finite(model) == []
    model.model.norm.weight.data[3] = float("nan")
    assert find_not_finite(model) == ["model.norm.weight"]


def tiny(family: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**TINY | settings)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "Phi3", "Granite"])
def test_logits_are_divided_by_the_temperature_in_every_family_and_no_fused_head_passes_it_by(family, tmp_path):
    name = "Gemma3Text" if family == "Gemma3" else family
    model = tiny(family) if family != "Gemma3" else AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**TINY))
    assert name in type(model.config).__name__
    model.eval()
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        divide_logits(model, 0.7)
        divided = model(input_ids=ids).logits
        add_fused_lm_head(model)
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    assert torch.allclose(divided * 0.7, plain, atol=1e-5)
    wanted = (plain / 0.7).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert torch.allclose(fused[:, -wanted.shape[1] :], wanted, atol=1e-4)


def test_an_architecture_whose_logits_cannot_be_divided_is_refused():
    model = tiny("Llama")
    model.model.final = model.model.norm
    del model.model.norm
    model.model.norm = None
    with pytest.raises((TrainingError, TypeError)):
        divide_logits(model, 0.7)


def test_what_is_trained_at_a_temperature_is_saved_as_the_model_is(demo_model, tmp_path, rows):
    warm = Config(training={"weights": "full"}, policy={"temperature": 0.5})
    model = load_trainable(warm, demo_model)
    moved(model)
    own = told(model, rows)
    save(model, tmp_path)
    plain = told(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), rows)
    assert not torch.allclose(plain, own, atol=1e-2)
    assert torch.allclose(told(load_trainable(warm, demo_model, str(tmp_path)), rows), own, atol=1e-5)
    with as_base(model):
        base = told(model, rows)
    assert torch.allclose(base, told(load_as_served(warm, demo_model), rows), atol=1e-5)


def test_a_capped_model_keeps_its_own_cap_in_its_files(tmp_path):
    model = tiny("Gemma2")
    cap = model.config.final_logit_softcapping
    divide_logits(model, 0.5)
    assert model.config.final_logit_softcapping == cap / 0.5
    model.base_weights = {}
    save(model, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").config
    assert saved.final_logit_softcapping == cap
    assert not hasattr(saved, "undivided_cap")
    assert model.config.final_logit_softcapping == cap / 0.5


def test_the_reference_is_computed_in_float32_and_the_weights_come_back_exactly(demo_model, rows):
    narrow = load_trainable(Config(serving={"dtype": "bfloat16"}), demo_model)
    before, rounded = copy_weights(narrow), told(narrow, rows)
    kept = {name: value.clone() for name, value in narrow.named_parameters()}
    with as_float32(narrow):
        exact = told(narrow, rows)
    assert 1e-4 < float((exact - rounded).abs().mean()) < 0.1
    assert torch.equal(told(narrow, rows), rounded)
    assert all(
        value.dtype == kept[name].dtype and torch.equal(value, kept[name]) for name, value in narrow.named_parameters()
    )
    assert set(before) == set(copy_weights(narrow))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_version_whose_files_are_gone_or_broken_is_named_with_what_to_do(demo_model, tmp_path, kind):
    version = tmp_path / "policy-7"
    save_random_version(Config(training={"weights": kind}), demo_model, version, seed=0)
    load_as_served(Config(), demo_model, str(version))  # the control
    (weights,) = version.rglob("*.safetensors")
    wanted = r"policy-7.* cannot be loaded.*policy-7, or take the version back with `kibitz rollback`"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TrainingError, match=wanted):
        load_as_served(Config(), demo_model, str(version))
    weights.unlink()
    with pytest.raises(TrainingError, match=wanted):
        load_as_served(Config(), demo_model, str(version))
    shutil.rmtree(version)
    with pytest.raises(TrainingError, match=wanted):
        load_as_served(Config(), demo_model, str(version))
