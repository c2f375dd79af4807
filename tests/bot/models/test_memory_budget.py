"""The arithmetic of memory: against what torch keeps, on cards of three sizes, and what a run makes of it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_sizes import MODELS, settings
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from bot.accelerator import GIB, Card
from bot.config import TrainingConfig, load
from bot.errors import ConfigError
from bot.models.memory_budget import (
    CUDA_GRAPH_BYTES,
    LEAST_PARALLEL_ANSWERS,
    SPARE_BYTES,
    BatchFit,
    count_parallel_answers,
    fit_batch,
    layer_activation_bytes,
    plan_memory,
    serving_bytes,
    token_cache_bytes,
    training_bytes,
)
from bot.models.shape import make_shape

DIMENSIONS = [  # hidden, intermediate, heads, key heads, head width: SmolLM2's, Qwen3's, the demo policy's
    (LlamaConfig, 576, 1536, 9, 3, 64),
    (Qwen3Config, 1024, 3072, 16, 8, 128),
    (Qwen3Config, 128, 384, 4, 4, 32),
]


def card(gib: float, free: float | None = None) -> Card:
    return Card("a GPU", int(gib * GIB), int((gib if free is None else free) * GIB))


def kept_by_torch(model: torch.nn.Module, tokens: torch.Tensor, bf16: bool) -> int:
    """The bytes that a forward pass keeps for the backward pass, but for the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        model.get_base_model().model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_activations_are_what_torch_keeps_and_a_little_more(dimensions, bf16):
    make, hidden, intermediate, heads, keys, width = dimensions
    made = make(
        vocab_size=256, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=keys, head_dim=width, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16 if bf16 else torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = torch.zeros((2, 128), dtype=torch.long)
    shape, training = make_shape(made.to_dict()), TrainingConfig()
    counted = 2 * layer_activation_bytes(shape, training, tokens.numel(), 2 if bf16 else 4)
    real = kept_by_torch(model, tokens, bf16)
    assert real <= counted <= 1.35 * real


def test_an_adapter_has_as_many_parameters_as_peft_gives_it():
    made = Qwen3Config(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=32)  # fmt: skip
    model = AutoModelForCausalLM.from_config(made)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert make_shape(made.to_dict()).count_adapter_parameters(8) == trained


# For each model, on 24, 48 and 80 GiB: answers at once, times a step, whether with gradient checkpointing; None: no room.
PLANS = {
    "SmolLM2-135M": [(16, 1, True), (16, 1, False), (16, 1, False)],
    "Qwen3-0.6B": [(16, 1, True), (16, 1, True), (16, 1, True)],
    "Qwen3-1.7B": [(16, 1, True), (16, 1, True), (16, 1, True)],
    "Qwen3-4B": [None, (16, 1, True), (16, 1, True)],
    "Qwen3-8B": [None, None, (16, 1, True)],
}


@pytest.mark.parametrize("gib", [24, 48, 80])
@pytest.mark.parametrize("name", MODELS)
def test_vllm_and_one_training_run_fit_on_the_card(name, gib):
    shape, config = make_shape(settings(name)), load(policy={"model": name})
    wanted = PLANS[name][[24, 48, 80].index(gib)]
    if wanted is None:
        with pytest.raises(ConfigError, match=r"do not fit on this GPU together.*serving\.sleep_while_training = true"):
            plan_memory(shape, config, card(gib))
        return
    plan = plan_memory(shape, config, card(gib))
    assert plan.batch is not None
    assert (plan.batch.answers, plan.batch.accumulation_steps, plan.batch.gradient_checkpointing) == wanted
    vllm, run = plan.share * gib * GIB, training_bytes(shape, config.policy, config.training, plan.batch, 2)
    assert vllm + CUDA_GRAPH_BYTES + run + SPARE_BYTES <= gib * GIB
    assert serving_bytes(shape, config.policy, config.serving, gib * GIB, 2) <= vllm
    assert f"serving.memory_share {plan.share:g}" in plan.description
    assert "\n" not in plan.description


def test_known_figures():
    shape = make_shape(settings("Qwen3-8B"))
    assert token_cache_bytes(shape, 2) == 147_456, "144 KiB a token, as vLLM reports for it"
    assert make_shape(settings("Qwen3-0.6B")).count_adapter_parameters(16) == 10_092_544, "as PEFT reports for it"


def test_a_smaller_batch_and_less_memory_go_together():
    shape, training = make_shape(settings("Qwen3-4B")), TrainingConfig()
    found = [fit_batch(shape, training, 16, 1024, room * GIB, 2) for room in (200, 20, 6, 3, 1)]
    told = [(fit.answers, fit.accumulation_steps, fit.gradient_checkpointing) if fit else None for fit in found]
    assert told == [(16, 1, False), (16, 1, True), (8, 2, True), (4, 4, True), None]
    other = fit_batch(shape, TrainingConfig(objective="sft"), 16, 1024, GIB, 2)
    assert other is not None
    assert other.answers < 4, "only KTO needs four at once"
    assert BatchFit(16, 1, False).shrink() == BatchFit(8, 2, True)
    assert BatchFit(6, 1, False).shrink() == BatchFit(4, 2, True)
    assert BatchFit(3, 1, True).shrink().answers == 3


@pytest.mark.parametrize(
    ("keys", "gib", "free", "wanted"),
    [
        ({}, 8, 8, "needs at least .* to be served, and the GPU has 8.0 GiB; use a smaller model"),
        ({"serving": {"memory_share": 0.1}}, 80, 80, "memory_share has value 0.1, 8.0 GiB of this GPU.*raise it to 0.2"),
        ({"serving": {"memory_share": 0.9}}, 48, 48, "do not fit .*lower serving.memory_share, set learning.enabled"),
        ({}, 80, 20, r"the GPU has 20.0 GiB of 80.0 GiB free.*see nvidia-smi"),
        ({"learning": {"enabled": False}}, 24, 20, "vLLM would take 22.1 GiB"),
    ],
)
def test_what_does_not_fit_is_one_line_with_what_to_do(keys, gib, free, wanted):
    config = load(policy={"model": "Qwen/Qwen3-8B"}, **keys)
    with pytest.raises(ConfigError, match=wanted) as error:
        plan_memory(make_shape(settings("Qwen3-8B")), config, card(gib, free))
    assert "\n" not in str(error.value)


def test_a_vllm_that_sleeps_leaves_its_memory_to_the_run():
    shape = make_shape(settings("Qwen3-4B"))
    config = load(serving={"sleep_while_training": True})
    plan = plan_memory(shape, config, card(24))
    assert plan.share > 0.8
    assert plan.description.endswith("vLLM sleeps meanwhile")


def test_as_many_answers_are_sampled_at_once_as_there_is_room_for_and_never_fewer_than_planned():
    shape = make_shape(settings("Qwen3-8B"))
    assert count_parallel_answers(shape, 1152, 0, 2) == LEAST_PARALLEL_ANSWERS
    assert count_parallel_answers(shape, 1152, 200 * GIB, 2) == 8 * LEAST_PARALLEL_ANSWERS
    some = count_parallel_answers(shape, 1152, 20 * GIB, 2)
    assert LEAST_PARALLEL_ANSWERS < some < 8 * LEAST_PARALLEL_ANSWERS
    assert some * (1152 * token_cache_bytes(shape, 2) + 12 * shape.vocabulary) <= 20 * GIB
    assert count_parallel_answers(shape, 576, 20 * GIB, 2) > some, "shorter answers take less"
