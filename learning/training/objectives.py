"""Objectives: train a model with one of TRL's trainers (`learning.training.token_trainers`).

Every objective learns from the same rows: exact recorded token ids, an advantage (the reward minus the average for such a
prompt) and a weight. `selection.select_for_training` selects the rows; each epoch reads them all, in an order of its own.
The reference is always the base model. For a continued adapter, TRL would use a copy of the adapter as it was at the start,
and the policy would drift away from its base.

- `kto`: Ethayarajh et al. (2024), "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306. Approval
  and disapproval, unpaired.
- `bco`: Jung et al. (2024), "Binary Classifier Optimization for Large Language Model Alignment", arXiv:2404.04656. Liked
  and disliked answers as a classifier's two classes, unpaired; without underlying distribution matching.
- `dpo`: Rafailov et al. (2023), "Direct Preference Optimization", arXiv:2305.18290. Pairs, with an SFT term, without which
  the likelihood of both answers falls.
- `sft`, `pg`, `mixed`: the terms of `learning.training.weighted_trainer`.
"""

import gc
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import trl.trainer.utils
from transformers import TrainerCallback

from bot.config import TrainingConfig
from bot.errors import NothingToLearn, TrainingError
from bot.models.memory_budget import BatchFit, describe_fit
from bot.types import Progress
from bot.wording import count_noun
from learning.data.experience import Experience
from learning.data.selection import draw_batches, select_for_training
from learning.judging.metrics import TrainingMetrics
from learning.models.batching import fit_to_machine, machine_arguments
from learning.models.ranks import compute_batch_share, count_processes
from learning.models.reporter import report_progress
from learning.models.trainable import draw_to_base
from learning.training.token_trainers import make_dpo_trainer, make_kto_trainer
from learning.training.weighted_trainer import make_weighted_trainer

FULL_STEP_ROWS = (
    64  # rows for steps of full size; fewer rows take smaller steps, because the noise of a mean goes with 1/sqrt(rows)
)


@contextmanager
def scoring_answers_alone() -> Iterator[None]:
    """Make TRL's fused head score only the tokens of answers in the block, as it does on GPUs.

    On CPUs it would also score the tokens of prompts, which are most of a chat, and discard the results.
    """
    theirs = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = theirs


class BaseWeightDecay(TrainerCallback):
    """Weight decay for whole weights: each step moves them towards the base by the share that an adapter would lose."""

    def __init__(self, config: TrainingConfig):
        self.config = config

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        """Move the weights towards the base, in proportion to the step's learning rate."""
        share = given["lr_scheduler"].get_last_lr()[0] / self.config.full_learning_rate
        draw_to_base(model, share * self.config.learning_rate * self.config.weight_decay)


@cache
def _freeze_loaded() -> None:
    """Keep what is loaded out of garbage collection, which accelerate asks for before and after each training."""
    gc.collect()
    gc.freeze()


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Experience],
    config: TrainingConfig,
    seed: int,
    progress: Progress,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingMetrics:
    """Train a model in place with the objective that `config` names.

    A batch is read in as many parts as the memory requires. If it runs out anyway, the number of parts is doubled and
    training begins again from the current weights. Raises NothingToLearn if the objective can use none of the rows, and
    TrainingError if the loss becomes NaN or the smallest parts do not fit.
    """
    make = {"kto": make_kto_trainer, "bco": make_kto_trainer, "dpo": make_dpo_trainer}.get(
        config.objective, make_weighted_trainer
    )
    usable, _ = select_for_training(rows, config, seed)
    if not usable:
        raise NothingToLearn(
            f"training.objective '{config.objective}' can use none of {count_noun(len(rows), 'answer')}; collect more "
            "reactions, or set another objective"
        )
    batch_size = min(config.batch_size, len(usable))
    fit = fit_to_machine(model, config, compute_batch_share(batch_size), max(map(_count_tokens, usable)))
    if fit.accumulation_steps > 1 or fit.gradient_checkpointing:
        progress(f"memory: {describe_fit(fit)}", 0, 1)
    _freeze_loaded()
    while True:
        try:
            with scoring_answers_alone():
                common = make_training_arguments(config, batch_size, len(usable), seed, fit)
                read = fit.answers * fit.accumulation_steps * count_processes()  # answers a step
                order = draw_batches(len(usable), read, common["max_steps"], random.Random(seed))
                trainer = make(model, tokenizer, usable, order, config, common)
                reporter = report_progress(trainer, "train", progress)
                for callback in (*([BaseWeightDecay(config)] if config.weights == "full" else []), *callbacks):
                    trainer.add_callback(callback)
                outcome = trainer.train()
            break
        except (torch.OutOfMemoryError, MemoryError) as error:
            if fit.answers <= 4 or config.processes > 1:  # several processes cannot restart at different moments
                raise TrainingError(
                    f"out of memory with {count_noun(fit.answers, 'answer')} at a time; lower training.max_length"
                ) from error
            fit = fit.shrink()
            progress(f"out of memory; going on with {count_noun(fit.answers, 'answer')} at a time", 0, 1)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    if not all(entry["loss"] == entry["loss"] for entry in logged) or not outcome.training_loss == outcome.training_loss:
        raise TrainingError("the loss became NaN; lower training.learning_rate")
    tail = logged[-max(1, len(logged) // 4) :]

    def mean(key: str) -> float:
        return _mean([entry[key] for entry in tail if key in entry])

    return TrainingMetrics(
        trl_loss=mean("loss"),
        trl_margins=mean("rewards/margins"),
        trl_kl=mean("kl"),
        trl_first_reward=logged[0].get("rewards/chosen", 0.0) if logged else 0.0,
        steps=outcome.global_step,
        step_seconds=reporter.seconds,
        train_loss=outcome.training_loss,
        rows=len(usable),
        loss=[entry["loss"] for entry in logged],
    )


def make_training_arguments(
    config: TrainingConfig, batch_size: int, rows: int, seed: int, fit: BatchFit | None = None
) -> dict[str, Any]:
    """Return the training arguments that all objectives share. Fewer rows take fewer and smaller steps."""
    steps = min(config.max_steps, math.ceil(config.epochs * rows / batch_size))
    rate = config.learning_rate if config.weights == "lora" else config.full_learning_rate
    return {
        "output_dir": "unused",
        "max_steps": steps,
        "learning_rate": rate * min(1.0, (rows / FULL_STEP_ROWS) ** 0.5),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": config.weight_decay if config.weights == "lora" else 0.0,
        "train_sampling_strategy": "sequential",  # TRL's KTO insists on it; our trainers have an `order`
        "seed": seed,
        **machine_arguments(fit or BatchFit(compute_batch_share(batch_size), 1, False)),
    }


def _count_tokens(row: Experience) -> int:
    return len(row.prompt_ids) + max(len(row.completion_ids), len(row.rejected_ids or ()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
