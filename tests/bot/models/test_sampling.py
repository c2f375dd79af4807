"""How answers are drawn: what suits a model where the operator does not say, and what a trainer can learn from."""

import json

import pytest
from conftest import answered, react

from bot.config import load
from bot.errors import ConfigError
from bot.models.sampling import apply_sampling_defaults, recommend_sampling
from bot.types import SamplingParams
from learning.data.replay_buffer import ReplayBuffer
from learning.models import builtin


def model_with(tmp_path, generation: dict | None, family: str) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return str(tmp_path)


def test_a_models_own_advice_comes_first_then_its_familys_and_what_the_operator_says_beats_both(tmp_path):
    model = model_with(tmp_path, {"temperature": 0.6, "top_k": 20, "eos_token_id": 2}, "gemma2")
    plain = load(policy={"model": model}).policy
    assert apply_sampling_defaults(plain, model).sampling == SamplingParams(temperature=0.6, top_p=1.0, top_k=20, min_p=0.0)
    said = load(policy={"model": model, "temperature": 0.9, "top_k": 0}).policy
    sampling = apply_sampling_defaults(said, model).sampling
    assert (sampling.temperature, sampling.is_truncated) == (0.9, False)
    (tmp_path / "generation_config.json").unlink()
    found, source = recommend_sampling(model)
    assert (found.top_k, source) == (64, "the family gemma2")
    assert recommend_sampling(model_with(tmp_path, {"eos_token_id": 2}, "nobody knows"))[1] == "no known family"


def test_the_built_in_model_is_sampled_as_was_measured_and_a_trainer_can_follow(tmp_path):
    model = model_with(tmp_path, builtin.SAMPLING, "llama")
    sampling = apply_sampling_defaults(load().policy, model).sampling
    assert sampling == SamplingParams(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0)


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}])
def test_what_was_drawn_from_a_truncated_distribution_is_learned_from_without_its_log_probabilities(
    config, store, tokenizer, cut
):
    turn = answered(store, tokenizer, "hello", "Hey there!", sampling=SamplingParams(temperature=0.7, **cut))
    react(store, turn, approves=True)
    (found,) = ReplayBuffer(store, tokenizer, config).snapshot().rated
    assert found.completion_ids == turn.completion_ids
    assert (found.logprobs is None) == bool(cut) == turn.sampling.is_truncated


@pytest.mark.parametrize(
    "advice",
    [
        *({"temperature": value} for value in (0, 0.0, -1, 9, float("nan"), float("inf"), True, "0.7", [0.7])),
        *({"top_p": value} for value in (0, 1.5, -0.1)),
        *({"min_p": value} for value in (1, 1.0, -0.5)),
        *({"top_k": value} for value in (50.5, -1, "50", True)),
    ],
    ids=str,
)
def test_advice_that_nobody_can_follow_is_refused_unless_the_operator_says_otherwise(tmp_path, advice):
    model = model_with(tmp_path, advice, "llama")
    (key,) = advice
    with pytest.raises(ConfigError, match=rf"generation_config\.json has {key} .*set policy\.{key} yourself") as error:
        apply_sampling_defaults(load(policy={"model": model}).policy, model)
    assert "\n" not in str(error.value)
    said = load(policy={"model": model, key: {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 7}[key]}).policy
    assert getattr(apply_sampling_defaults(said, model), key) == getattr(said, key)


@pytest.mark.parametrize("content", ["[1]", "{", "3", '"text"'])
def test_advice_that_is_no_json_object_is_refused(tmp_path, content):
    model = model_with(tmp_path, None, "llama")
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"its generation_config\.json cannot be read \(.*\); correct it"):
        recommend_sampling(model)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (SamplingParams(), ""),
        (
            SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=128),
            "temperature 1, at most 128 tokens",
        ),
        (SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1), "temperature 0.7, top_p 0.9, top_k 20, min_p 0.1"),
        (SamplingParams(max_tokens=1, seed=7, stop=["END"]), "at most 1 token, seed 7, 1 stop text"),
    ],
)
def test_how_an_answer_was_sampled_is_told_in_words(sampling, told):
    assert sampling.describe() == told
