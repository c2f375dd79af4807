"""Token trainers: TRL's trainers on exact token ids, with the base model as the reference.

The references are computed once, before the first step. `learning.training.objectives` runs these trainers and says which
rows they get.
"""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from bot.config import TrainingConfig
from learning.data.experience import Experience
from learning.judging.evaluation import pad_id
from learning.models.ranks import share_dataset
from learning.models.trainable import as_base

SHIFT_DECAY = 0.9  # for each step: BCO's means reach back about ten steps, a third of a run


class OrderedTrainer(Trainer):
    """A trainer that reads its rows (by number) in a given `order`, each as often as it is there."""

    order: Sequence[int]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sequence[int]:
        return self.order


class AnchoredTrainer(OrderedTrainer):
    """A TRL trainer whose reference is the base model, not the policy at the start of the run. It is computed once a row."""

    def anchor_to_base(self) -> AbstractContextManager[Any]:
        """Make the model the base model for the block, and delete TRL's own reference, a copy of a continued adapter."""
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")
        return as_base(self.model)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        with self.anchor_to_base():
            return super()._precompute_ref_logps(share_dataset(dataset), name, batch_size)


class _WeightedCollator(DataCollatorForUnpairedPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples) | {"weight": torch.tensor([example["weight"] for example in examples])}


class TokenKTOTrainer(AnchoredTrainer, KTOTrainer):
    """KTOTrainer on rows of `prompt_ids`, `completion_ids`, `label` and `weight`.

    The KL term pairs each prompt with the answer of another row, in the whole run with the same one.
    """

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, name: str) -> Dataset:
        shuffled = random.Random(args.seed).sample(range(len(dataset)), len(dataset))
        other = dict(zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True))
        completions = dataset["completion_ids"]
        return dataset.add_column("KL_completion_ids", [completions[other[row]] for row in range(len(dataset))])

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        weight, liked = inputs.pop("weight"), inputs["label"].bool()
        self.desirable_weight, self.undesirable_weight = weight[liked], weight[~liked]
        return super()._compute_loss(model, inputs, return_outputs)


class TokenBCOTrainer(AnchoredTrainer, KTOTrainer):
    """Binary Classifier Optimization, on the rows of TokenKTOTrainer.

    The reward r of an answer is β times its log-ratio to the base. The loss of a row is -w·log σ(r - δ) if the answer is
    liked, and -w·log σ(δ - r) if it is disliked. The reward shift δ is halfway between the mean rewards of liked and of
    disliked answers: means weighted like the loss, exponential over the run's steps, of all processes. A class without
    answers so far counts as 0, the reward of the base. The paper's second part, underlying distribution matching, which
    weights disliked answers by how much their prompts resemble those of liked ones, is left out.
    """

    totals: torch.Tensor | float = 0.0  # (2 × 2): of liked and of disliked answers, the decayed sums of w·r and of w

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, name: str) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        names = ("input_ids", "attention_mask")
        outputs = model(**{name: inputs[name] for name in names}, labels=labels, use_cache=False, fused_lm_head=True)
        logps = outputs.log_probs[:, -(labels.shape[1] - 1) :].sum(1)
        rewards, weight = self.beta * (logps - inputs["ref_logps"]), inputs["weight"]
        liked = inputs["label"].bool()
        shift = self._update_shift(rewards.detach(), weight, liked)
        loss = -(weight * F.logsigmoid(torch.where(liked, rewards - shift, shift - rewards))).mean()
        return (loss, outputs) if return_outputs else loss

    def _update_shift(self, rewards: torch.Tensor, weight: torch.Tensor, liked: torch.Tensor) -> torch.Tensor:
        """Add one part of a batch to the mean rewards, log its own means, and return the reward shift."""
        sums = torch.stack([torch.stack([(weight * rewards)[own].sum(), weight[own].sum()]) for own in (liked, ~liked)])
        sums = self.accelerator.reduce(sums, reduction="sum")
        means = {name: float(total / of) for name, (total, of) in zip(("chosen", "rejected"), sums, strict=True) if of > 0}
        for name, mean in means.items():
            self._metrics["train"][f"rewards/{name}"].append(mean)
        if len(means) == 2:
            self._metrics["train"]["rewards/margins"].append(means["chosen"] - means["rejected"])
        self.totals = SHIFT_DECAY ** (1 / self.args.gradient_accumulation_steps) * self.totals + sums
        total, of = self.totals.unbind(1)
        return (total / of.clamp(min=torch.finfo(of.dtype).tiny)).mean()


class TokenDPOTrainer(AnchoredTrainer, DPOTrainer):
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, name: str) -> Dataset:
        return dataset


def kto_examples(rows: Sequence[Experience]) -> list[dict[str, Any]]:
    """Convert rows to the format of KTO and BCO. Weights are absolute advantages, so that both classes weigh the same."""
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


def make_kto_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Experience],
    order: Sequence[int],
    config: TrainingConfig,
    common: dict[str, Any],
) -> KTOTrainer:
    """Make a trainer for `kto` or `bco` that reads the rows in this `order`."""
    # TRL reads no KL batch for this loss, and BCO needs none. BCO's own loss takes its place.
    made, loss = (TokenBCOTrainer, "apo_zero_unpaired") if config.objective == "bco" else (TokenKTOTrainer, "kto")
    settings = KTOConfig(
        **common,
        beta=config.beta,
        loss_type=loss,
        max_length=None,
        precompute_ref_log_probs=True,
        remove_unused_columns=False,
    )
    trainer = made(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(kto_examples(rows)),
        processing_class=tokenizer,
        data_collator=_WeightedCollator(pad_token_id=pad_id(tokenizer)),
    )
    trainer.order = order
    return trainer


def make_dpo_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Experience],
    order: Sequence[int],
    config: TrainingConfig,
    common: dict[str, Any],
) -> DPOTrainer:
    """Make a trainer for `dpo` that reads the rows in this `order`."""
    settings = DPOConfig(
        **common, beta=config.beta, max_length=None, loss_type=["sigmoid", "sft"], precompute_ref_log_probs=True
    )
    trainer = TokenDPOTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(dpo_examples(rows)), processing_class=tokenizer
    )
    trainer.order = order
    return trainer
