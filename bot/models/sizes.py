"""Sizes: the training defaults that depend on how large a model is, in one table, with their reasons.

What the operator sets always wins: only keys that no config file and no command named are filled in.
"""

from dataclasses import dataclass
from typing import Any

from bot.accelerator import has_gpu
from bot.config import Config
from bot.models.shape import ModelShape, read_shape


@dataclass(frozen=True)
class SizeDefaults:
    """The defaults for models of up to so many billion parameters, of one family or of any ("")."""

    max_billions: float
    family: str
    learning_rate: float
    lora_rank: int
    batch_size: int
    max_steps: int
    kl_budget: float
    smoothing: float
    reason: str


# The first row that fits is taken. All ranks are 16: what a few hundred reactions say is far less than such an adapter
# holds, and vLLM's serving.max_lora_rank is 16. All batches are 16: KTO's KL term is a mean over the batch, and below 16 it
# is mostly noise; memory decides how many of them are read at once (bot/models/memory_budget.py), not how many make a step.
# All but the toy policy learn from what answers like each one earned: in free English one reaction says next to nothing of
# the words of one answer. Without smoothing the built-in model gained or broke as the draw of reactions would have it
# (docs/experiments.md).
SIZE_TABLE = (
    SizeDefaults(
        max_billions=0.02, family="", learning_rate=1e-3, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.5, smoothing=0.0,
        reason="measured on the toy policy (docs/experiments.md); its answers are short and its weights few",
    ),
    SizeDefaults(
        max_billions=0.2, family="llama", learning_rate=5e-4, lora_rank=16, batch_size=16, max_steps=36,
        kl_budget=0.5, smoothing=0.9,
        reason="SmolLM2-135M: measured (docs/experiments.md)",
    ),
    SizeDefaults(
        max_billions=0.4, family="", learning_rate=3e-4, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.5, smoothing=0.9,
        reason="as SmolLM2-135M, the only model of this size that was looked at",
    ),
    SizeDefaults(
        max_billions=2.5, family="", learning_rate=2e-4, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.2, smoothing=0.9,
        reason="the usual rate of LoRA on models that talk; 0.2 nats a token are some twenty an answer, which is far",
    ),
    SizeDefaults(
        max_billions=10, family="", learning_rate=1e-4, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.2, smoothing=0.9,
        reason="wide layers add up more of each step, so that half the rate moves a policy as far",
    ),
    SizeDefaults(
        max_billions=float("inf"), family="", learning_rate=5e-5, lora_rank=16, batch_size=16, max_steps=30,
        kl_budget=0.2, smoothing=0.9,
        reason="wider still: half the rate again",
    ),
)  # fmt: skip


# Without a GPU all but the toy policy learn from shorter turns: minutes, not hours.
CPU_DEFAULTS: dict[str, dict[str, Any]] = {"training": {"max_length": 512}}
# A replay reads whole recorded conversations, no two of which begin alike: it takes fewer steps and fewer samples.
CPU_REPLAY_DEFAULTS: dict[str, dict[str, Any]] = {"training": {"max_steps": 24}, "gate": {"samples": 96}}


def find_defaults(shape: ModelShape) -> SizeDefaults:
    """Return the row of the table for a model."""
    return next(row for row in SIZE_TABLE if shape.billions <= row.max_billions and row.family in ("", shape.family))


def apply_size_defaults(config: Config, model: str, replays: bool = False) -> Config:
    """Return the config with the keys of the table that nobody set filled in for a model's size and family.

    Without a GPU an offline replay is shorter than a run beside the chat.
    """
    wanted = _values(find_defaults(read_shape(model)), replays)
    return config.model_copy(update={name: getattr(config, name).fill(values) for name, values in wanted.items()})


def describe_sizes(config: Config, model: str, asked: Config | None = None) -> str:
    """Describe in one line what a run uses for a model of this size; what `asked` set itself is marked."""
    shape = read_shape(model)
    row = find_defaults(shape)
    own = [
        f"{name}.{key}"
        for name, values in _values(row).items()
        for key in values
        if asked is not None and key in getattr(asked, name).model_fields_set
    ]
    training = config.training
    return (
        f"training for {shape.size_label} parameters ({shape.family or 'unknown family'}): learning rate "
        f"{training.learning_rate:g}, rank {training.lora_rank}, {training.batch_size} answers a step, "
        f"{training.max_steps} steps, {training.max_length} tokens, smoothing "
        f"{config.rewards.smoothing:g}, KL budget {config.gate.kl_budget:g} "
        f"({'set by you: ' + ', '.join(own) if own else row.reason})"
    )


def _values(row: SizeDefaults, replays: bool = False) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {
        "training": {
            "learning_rate": row.learning_rate,
            "lora_rank": row.lora_rank,
            "batch_size": row.batch_size,
            "max_steps": row.max_steps,
        },
        "rewards": {"smoothing": row.smoothing},
        "gate": {"kl_budget": row.kl_budget},
    }
    if not has_gpu() and row is not SIZE_TABLE[0]:
        for section, values in (*CPU_DEFAULTS.items(), *(CPU_REPLAY_DEFAULTS.items() if replays else ())):
            found[section] |= values
    return found
