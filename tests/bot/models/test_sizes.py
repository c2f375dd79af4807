"""The defaults that depend on a model's size: the demo policy's are the config's, and what is set is left alone."""

import json
from pathlib import Path

import pytest

from bot.config import Config, load
from bot.errors import ConfigError
from bot.models.purpose import Purpose
from bot.models.shape import count_parameters, make_shape, read_shape
from bot.models.sizes import apply_size_defaults, describe_sizes, find_defaults

# From the models' own config.json: hidden, intermediate, layers, heads, key heads, head width, vocabulary, tied.
MODELS = {
    "SmolLM2-135M": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True, 0.1345),
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 0.596),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True, 1.72),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True, 4.02),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False, 8.19),
}


def settings(name: str) -> dict:
    """A model's config.json, as far as its size goes."""
    family, hidden, intermediate, layers, heads, keys, width, vocabulary, tied, _ = MODELS[name]
    return {
        "model_type": family, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": width, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "dtype": "bfloat16", "max_position_embeddings": 40960,
    }  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_published_models(name):
    assert make_shape(settings(name)).billions == pytest.approx(MODELS[name][-1], rel=0.01)


def test_a_size_is_told_as_people_say_it():
    assert [make_shape(settings(name)).size_label for name in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B")] == [
        "596M",
        "1.72B",
        "8.19B",
    ]


def test_the_size_of_a_saved_model_is_counted(demo_model):
    shape = read_shape(demo_model)
    assert shape.family == "qwen3"
    assert shape.parameters == count_parameters(Path(demo_model)) > 0
    assert make_shape(json.loads((Path(demo_model) / "config.json").read_text())).parameters == (
        pytest.approx(shape.parameters, rel=0.01)
    )
    with pytest.raises(ConfigError, match=r"config\.json cannot be used"):
        read_shape("/no/model")


def test_the_demo_policy_has_the_defaults_of_the_config(demo_model):
    config = load(policy={"model": demo_model})
    assert apply_size_defaults(config, demo_model) == config == Config(policy=config.policy)


def test_larger_models_take_smaller_steps_and_what_is_set_is_left_alone(tmp_path):
    rates = []
    for name in MODELS:
        (tmp_path / "config.json").write_text(json.dumps(settings(name)))
        applied = apply_size_defaults(load(), str(tmp_path))
        rates.append(applied.training.learning_rate)
        assert applied.training.lora_rank <= applied.serving.max_lora_rank
        assert "set by you" not in describe_sizes(applied, str(tmp_path), load())
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]
    asked = load(training={"learning_rate": 1e-3, "epochs": 3}, gate={"kl_budget": 0.5})
    applied = apply_size_defaults(asked, str(tmp_path))
    assert (applied.training.learning_rate, applied.gate.kl_budget, applied.training.epochs) == (1e-3, 0.5, 3)
    assert "set by you: training.learning_rate, gate.kl_budget)" in describe_sizes(applied, str(tmp_path), asked)


@pytest.mark.parametrize("purpose", [Purpose.REPLAY, Purpose.SIMULATE])
def test_without_a_gpu_the_runs_of_a_replay_or_simulation_are_shorter_than_those_beside_the_chat(
    tmp_path, monkeypatch, purpose
):
    (tmp_path / "config.json").write_text(json.dumps(settings("SmolLM2-135M")))
    asked = load(gate={"samples": 48})
    for has_gpu, steps, samples in ((False, 24, 96), (True, 36, 192)):
        monkeypatch.setattr("bot.models.sizes.has_gpu", lambda found=has_gpu: found)
        found = apply_size_defaults(load(), str(tmp_path), purpose)
        assert (found.training.max_steps, found.gate.samples) == (steps, samples)
        assert found.learning.distil_prompts == (20 if has_gpu else 4)
        assert apply_size_defaults(load(), str(tmp_path)).training.max_steps == 36
        assert apply_size_defaults(asked, str(tmp_path), purpose).gate.samples == 48


def test_what_is_filled_in_stays_when_the_config_goes_to_a_child(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings("Qwen3-4B")))
    applied = apply_size_defaults(load(), str(tmp_path))
    applied.save(tmp_path / "resolved.json")
    assert apply_size_defaults(load(tmp_path / "resolved.json"), str(tmp_path)) == applied


def test_the_family_counts_where_the_table_names_one():
    llama = find_defaults(make_shape(settings("SmolLM2-135M")))
    other = find_defaults(make_shape(settings("SmolLM2-135M") | {"model_type": "other"}))
    assert (llama.family, other.family) == ("llama", "")
