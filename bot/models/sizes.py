"""Sizes: the training defaults that depend on the size of a model, in one table, with their reasons.

They apply only to keys that neither a config file nor a command sets.
"""

from dataclasses import dataclass
from typing import Any

from bot.accelerator import has_gpu
from bot.config import Config
from bot.models.purpose import Purpose
from bot.models.shape import ModelShape, read_shape
from bot.wording import count_noun


@dataclass(frozen=True)
class SizeDefaults:
    """The defaults for models of up to `max_billions` billion parameters, of one family or of any ("")."""

    max_billions: float
    family: str
    learning_rate: float
    lora_rank: int
    batch_size: int
    max_steps: int
    kl_budget: float
    smoothing: float
    distil_rate: float
    reason: str


# The first row that fits applies. All ranks are 16: a few hundred reactions carry far less information than such an adapter
# holds, and vLLM's serving.max_lora_rank is 16. All batches are 16: KTO's KL term is a mean over the batch, and below 16 it
# is mostly noise. Memory limits how many answers are read at once (bot/models/memory_budget.py), not how many make a step.
# All but the toy policy smooth rewards over similar answers: in free English one reaction says almost nothing about the
# words of one answer. Without smoothing the built-in model improved or broke by the chance of the drawn reactions
# (docs/experiments.md). Labels move a real model further than the toy in as many steps, so that these are half as large.
SIZE_TABLE = (
    SizeDefaults(
        max_billions=0.02, family="", learning_rate=1e-3, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.5, smoothing=0.0, distil_rate=4.0,
        reason="measured on the toy policy (docs/experiments.md); its answers are short and its weights few",
    ),
    SizeDefaults(
        max_billions=0.2, family="llama", learning_rate=5e-4, lora_rank=16, batch_size=16, max_steps=36,
        kl_budget=0.5, smoothing=0.9, distil_rate=2.0,
        reason="SmolLM2-135M: measured (docs/experiments.md)",
    ),
    SizeDefaults(
        max_billions=0.4, family="", learning_rate=3e-4, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.5, smoothing=0.9, distil_rate=2.0,
        reason="as for SmolLM2-135M, the only measured model of this size",
    ),
    SizeDefaults(
        max_billions=2.5, family="", learning_rate=2e-4, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.2, smoothing=0.9, distil_rate=2.0,
        reason="the usual LoRA rate for chat models; 0.2 nats per token are some twenty per answer, which is a lot",
    ),
    SizeDefaults(
        max_billions=10, family="", learning_rate=1e-4, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.2, smoothing=0.9, distil_rate=2.0,
        reason="in wide layers each step changes the output more, so that half the rate moves a policy as far",
    ),
    SizeDefaults(
        max_billions=float("inf"), family="", learning_rate=5e-5, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.2, smoothing=0.9, distil_rate=2.0,
        reason="wider still: half the rate again",
    ),
)  # fmt: skip


# Without a GPU all but the toy policy learn from shorter turns and from fewer answers of their own, so that a run takes
# minutes, not hours; and people choose from fewer answers, so that they need not wait for seconds.
CPU_DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"max_length": 512},
    "learning": {"distil_prompts": 8, "own_answers": 2},
    "serving": {"candidates": 4},
}
# A replay reads whole recorded conversations, which share no beginnings, and people who are simulated need no version for
# long: both take fewer steps and samples to save time.
CPU_SHORT_DEFAULTS: dict[str, dict[str, Any]] = {
    "training": {"max_steps": 24},
    "learning": {"distil_prompts": 4},
    "gate": {"samples": 96},
}


def find_defaults(shape: ModelShape) -> SizeDefaults:
    """Return the row of SIZE_TABLE for a model."""
    return next(row for row in SIZE_TABLE if shape.billions <= row.max_billions and row.family in ("", shape.family))


def apply_size_defaults(config: Config, model: str, purpose: Purpose = Purpose.SERVE) -> Config:
    """Return the config with the defaults for a model's size and family in the keys that nobody set.

    Without a GPU the runs of a replay or a simulation are shorter than those beside the chat.
    """
    wanted = _values(find_defaults(read_shape(model)), purpose)
    return config.model_copy(update={name: getattr(config, name).fill(values) for name, values in wanted.items()})


def describe_sizes(config: Config, model: str, asked: Config | None = None) -> str:
    """Describe in one line the training settings for a model, and which of them `asked`, the operator's config, sets."""
    shape = read_shape(model)
    row = find_defaults(shape)
    own = [
        f"{name}.{key}"
        for name, values in _values(row, Purpose.SERVE).items()
        for key in values
        if asked is not None and key in getattr(asked, name).model_fields_set
    ]
    training = config.training
    return (
        f"training for {shape.size_label} parameters ({shape.family or 'unknown family'}): learning rate "
        f"{training.learning_rate:g}, rank {training.lora_rank}, {count_noun(training.batch_size, 'answer')} a step, "
        f"{count_noun(training.max_steps, 'step')}, {count_noun(training.max_length, 'token')}, smoothing "
        f"{config.rewards.smoothing:g}, KL budget {config.gate.kl_budget:g} "
        f"({'set by you: ' + ', '.join(own) if own else row.reason})"
    )


def _values(row: SizeDefaults, purpose: Purpose) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "training": {
            "learning_rate": row.learning_rate,
            "lora_rank": row.lora_rank,
            "batch_size": row.batch_size,
            "max_steps": row.max_steps,
        },
        "rewards": {"smoothing": row.smoothing},
        "gate": {"kl_budget": row.kl_budget},
        "learning": {"distil_rate": row.distil_rate},
    }
    if not has_gpu() and row is not SIZE_TABLE[0]:
        is_short = purpose in (Purpose.REPLAY, Purpose.SIMULATE)
        for section, values in (*CPU_DEFAULTS.items(), *(CPU_SHORT_DEFAULTS.items() if is_short else ())):
            found[section] = found.get(section, {}) | values
    return found
