"""Objectives: what a training run minimises. The only module that knows TRL's preference trainers.

KTO (Ethayarajh et al., 2024, arXiv:2402.01306) learns from unpaired approval and disapproval. TRL's trainer is used with
two changes: rows are the recorded token ids (no text is tokenized again), and the reference is the base model also where
an adapter is continued (TRL would keep a copy of the adapter as it was, and the policy walks away from its base).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import KTOConfig, KTOTrainer

from bot.config import TrainingConfig

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One answer to learn from: its exact token ids, and whether it was wanted."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    desirable: bool


class TokenKTOTrainer(KTOTrainer):
    """KTOTrainer on rows of `prompt_ids`, `completion_ids` and `label`, anchored to the base model."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.anchor_to_base()

    def anchor_to_base(self) -> None:
        """Drop the copy of the adapter that TRL would take as the reference; without it, that is the base model."""
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, name: str) -> Dataset:
        def rotated(batch: dict[str, list]) -> dict[str, list]:
            completions = batch["completion_ids"]
            return {"KL_completion_ids": [completions[-1], *completions[:-1]]}

        return dataset.map(rotated, batched=True, batch_size=args.per_device_train_batch_size)


def train_kto(
    model: Any, tokenizer: Any, rows: Sequence[Row], config: TrainingConfig, seed: int, progress: Progress
) -> dict[str, float]:
    """Train a PeftModel in place on `rows` and return the averages of the last steps' metrics.

    The KL term of KTO is one batch mean over neighbours in a fixed order, so the rows are shuffled here, once an epoch,
    and a batch is never smaller than the others.
    """
    order = random.Random(seed)
    batch_size = min(config.batch_size, len(rows))
    stream: list[Row] = []
    for _ in range(config.epochs):
        stream += order.sample(list(rows), len(rows))
    stream = stream[: min(len(stream) // batch_size, config.max_steps) * batch_size]
    liked = sum(row.desirable for row in rows)
    desirable, undesirable = class_weights(liked, len(rows) - liked)
    trainer = TokenKTOTrainer(
        model=model,
        args=KTOConfig(
            output_dir="unused",
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            beta=config.beta,
            desirable_weight=desirable,
            undesirable_weight=undesirable,
            max_length=config.max_length,
            seed=seed,
            **cpu_arguments(),
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt_ids": [*row.prompt_ids], "completion_ids": [*row.completion_ids], "label": row.desirable}
                for row in stream
            ]
        ),
        processing_class=tokenizer,
    )
    report_progress(trainer, "train", progress)
    outcome = trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    tail = logged[-max(1, len(logged) // 4) :]
    measures = {key: _mean([entry[key] for entry in tail if key in entry]) for key in ("loss", "rewards/margins", "kl")}
    return {
        **{f"trl/{key}": value for key, value in measures.items()},
        "trl/first_reward": logged[0].get("rewards/chosen", 0.0) if logged else 0.0,
        "steps": outcome.global_step,
        "train_loss": outcome.training_loss,
    }


def class_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """The weights of the two classes: equal in total, by raising the rarer one alone (KTO paper, Eq. 8)."""
    if not desirable or not undesirable:
        return 1.0, 1.0
    return max(1.0, undesirable / desirable), max(1.0, desirable / undesirable)


def cpu_arguments() -> dict[str, Any]:
    """The training arguments that depend on the machine, and those that keep a run quiet and without side files."""
    import torch

    on_gpu = torch.cuda.is_available()
    return {
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": on_gpu,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }


class _Reporter(TrainerCallback):
    def __init__(self, stage: str, progress: Progress):
        self.stage, self.progress = stage, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(self.stage, state.global_step, state.max_steps)


def report_progress(trainer: Trainer, stage: str, progress: Progress) -> None:
    """Report the steps of `trainer` to `progress(stage, done, total)` instead of printing them."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Reporter(stage, progress))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
