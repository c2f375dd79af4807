"""Objectives: train a model with one of TRL's trainers.

Every objective learns from the same rows: exact recorded token ids, an advantage (the reward minus the average for such a
prompt) and a weight. `selection.select_for_training` selects the rows; each epoch reads them all, in an order of its own.
The reference is always the base model. For a continued adapter, TRL would use a copy of the adapter as it was at the start,
and the policy would drift away from its base.

- `kto`: Ethayarajh et al. (2024), "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306. Approval
  and disapproval, unpaired.
- `dpo`: Rafailov et al. (2023), "Direct Preference Optimization", arXiv:2305.18290. Pairs, with an SFT term, without which
  the likelihood of both answers falls.
- `sft`, `pg`, `mixed`: the terms of `learning.training.weighted_trainer`.
"""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from bot.config import TrainingConfig
from bot.errors import NothingToLearn, TrainingError
from bot.models.memory_budget import BatchFit, describe_fit
from bot.types import Progress
from bot.wording import count_noun
from learning.data.experience import Experience
from learning.data.selection import draw_batches, select_for_training
from learning.judging.evaluation import pad_id
from learning.judging.metrics import TrainingMetrics
from learning.models.batching import fit_to_machine, machine_arguments
from learning.models.ranks import compute_batch_share, count_processes, share_dataset
from learning.models.reporter import report_progress
from learning.models.trainable import as_base, draw_to_base
from learning.training.weighted_trainer import make_weighted_trainer

FULL_STEP_ROWS = (
    64  # rows for steps of full size; fewer rows take smaller steps, because the noise of a mean goes with 1/sqrt(rows)
)


class AnchoredTrainer(Trainer):
    """A TRL trainer whose reference is the base model, not the policy at the start of the run."""

    def anchor_to_base(self) -> AbstractContextManager[Any]:
        """Make the model the base model for the block, and delete TRL's own reference, a copy of a continued adapter."""
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        return as_base(self.model)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        with self.anchor_to_base():
            return super()._precompute_ref_logps(share_dataset(dataset), name, batch_size)


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


class _WeightedCollator(DataCollatorForUnpairedPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"weight": torch.tensor([example["weight"] for example in examples])}


class BaseWeightDecay(TrainerCallback):
    """Weight decay for whole weights: each step moves them towards the base by the share that an adapter would lose."""

    def __init__(self, config: TrainingConfig):
        self.config = config

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        """Move the weights towards the base, in proportion to the step's learning rate."""
        share = given["lr_scheduler"].get_last_lr()[0] / self.config.full_learning_rate
        draw_to_base(model, share * self.config.learning_rate * self.config.weight_decay)


class TokenKTOTrainer(AnchoredTrainer, KTOTrainer):
    """KTOTrainer on rows of `prompt_ids`, `completion_ids`, `label` and `weight`, which are read in the given order.

    The KL term pairs each prompt with the answer of its neighbour in the batch, so it depends on that order.
    """

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, name: str) -> Dataset:
        def rotated(batch: dict[str, list]) -> dict[str, list]:
            completions = batch["completion_ids"]
            return {"KL_completion_ids": [completions[-1], *completions[:-1]]}

        return dataset.map(rotated, batched=True, batch_size=args.per_device_train_batch_size)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weight, liked = inputs.pop("weight"), inputs["label"].bool()
        self.desirable_weight, self.undesirable_weight = weight[liked], weight[~liked]
        return super()._compute_loss(model, inputs, return_outputs)


class TokenDPOTrainer(AnchoredTrainer, DPOTrainer):
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, read in a given `order`."""

    order: Sequence[int]

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, name: str) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sequence[int]:
        return self.order


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
    make = {"kto": _make_kto_trainer, "dpo": _make_dpo_trainer}.get(config.objective, make_weighted_trainer)
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


def kto_examples(rows: Sequence[Experience]) -> list[dict[str, Any]]:
    """Convert rows to KTO's format. Weights are absolute advantages, so that both classes weigh the same."""
    return [
        {
            "prompt_ids": [*row.prompt_ids],
            "completion_ids": [*row.completion_ids],
            "label": row.advantage > 0,
            "weight": row.weight * abs(row.advantage),
        }
        for row in rows
    ]


def dpo_examples(rows: Sequence[Experience]) -> list[dict[str, Any]]:
    """Convert rows with a pair to DPO's format."""
    return [
        {
            "prompt_ids": [*row.prompt_ids],
            "chosen_ids": [*row.completion_ids],
            "rejected_ids": [*(row.rejected_ids or ())],
        }
        for row in rows
    ]


def _make_kto_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Experience],
    order: Sequence[int],
    config: TrainingConfig,
    common: dict[str, Any],
) -> KTOTrainer:
    settings = KTOConfig(
        **common, beta=config.beta, max_length=None, precompute_ref_log_probs=True, remove_unused_columns=False
    )
    return TokenKTOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(kto_examples([rows[row] for row in order])),
        processing_class=tokenizer,
        data_collator=_WeightedCollator(pad_token_id=pad_id(tokenizer)),
    )


def _make_dpo_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Experience],
    order: Sequence[int],
    config: TrainingConfig,
    common: dict[str, Any],
) -> DPOTrainer:
    settings = DPOConfig(
        **common, beta=config.beta, max_length=None, loss_type=["sigmoid", "sft"], precompute_ref_log_probs=True
    )
    trainer = TokenDPOTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(dpo_examples(rows)), processing_class=tokenizer
    )
    trainer.order = order
    return trainer


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
        "train_sampling_strategy": "sequential",
        "seed": seed,
        **machine_arguments(fit or BatchFit(compute_batch_share(batch_size), 1, False)),
    }


def _count_tokens(row: Experience) -> int:
    return len(row.prompt_ids) + max(len(row.completion_ids), len(row.rejected_ids or ()))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
