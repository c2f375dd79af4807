"""WeightedTrainer: TRL's SFTTrainer with a loss term for each row, and a KL penalty that keeps the model near its base.

Each term is computed on exact token ids and multiplied by the row's weight. Δ is the log-ratio of an answer to the base:

- `imitate`: -log p, averaged over tokens: supervised fine-tuning.
- `reinforce`: -A · min(p/b, 2) · log p, averaged over tokens: the policy gradient of J = Σ A·p(b) for answers that another
  version b sampled. The importance weight of each token is cut at 2 (Munos et al., 2016, "Safe and Efficient Off-Policy
  Reinforcement Learning", arXiv:1606.02647, cut it at 1).
- `prospect`: -|A| · σ(±β·Δ): bounded, so that a disliked answer cannot be pushed down forever (the loss of
  `apo_zero_unpaired`, D'Oosterlinck et al., 2024, "Anchored Preference Optimization", arXiv:2408.06266).
- `prefer`: -log σ(β·(Δ of the answer - Δ of the rejected one)): the loss of DPO, for rows with a pair.

The penalty is `anchor` times an estimate of the row's KL to the base (Schulman's k3, "Approximating KL Divergence", 2020).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer

from bot.config import TrainingConfig
from learning.data.experience import Experience
from learning.data.selection import group_by_length
from learning.judging.evaluation import batched_logprobs, pad_id, token_rows
from learning.models.trainable import as_base
from learning.training.token_trainers import OrderedTrainer

CUT = 2.0  # the largest importance weight
TERMS = ("imitate", "reinforce", "prospect", "prefer")


class WeightedTrainer(OrderedTrainer, SFTTrainer):
    """SFTTrainer on rows of token ids, labels and the inputs of their loss terms (`_make_examples`)."""

    terms: TrainingConfig
    usual_length: float
    loss_is_scaled_for_ga = False  # the loss of a part of a batch is its own mean: `num_items_in_batch` is ignored

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean over rows of the loss term and the KL penalty."""
        names = ("input_ids", "attention_mask", "labels")
        outputs = model(**{name: inputs[name] for name in names}, use_cache=False, fused_lm_head=True)
        mask = (inputs["labels"][:, 1:] != -100).float()
        logps = outputs.log_probs[:, -mask.shape[1] :] * mask
        losses = row_losses(logps, mask, inputs, self.terms, self.usual_length)
        loss = losses.sum() / inputs["weight"].gt(0).sum().clamp(min=1)
        self._metrics["train"]["kl"].append(((logps.detach() - inputs["reference"]) * mask).sum().item() / mask.sum().item())
        return (loss, outputs) if return_outputs else loss


def row_losses(
    logps: torch.Tensor,
    mask: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    config: TrainingConfig,
    lengths: float,
) -> torch.Tensor:
    """Return the loss of each row (n,), from the log-probabilities of its tokens (n × tokens, zero where `mask` is zero).

    In a pair the preferred answer comes first and the rejected one right after it, with weight 0.
    """
    advantage, weight, term = inputs["advantage"], inputs["weight"], inputs["term"]
    ratio = ((logps - inputs["reference"]) * mask).sum(1)
    behind = (logps - inputs["behaviour"]) * mask
    importance = behind.clamp(max=10).exp().clamp(max=CUT).detach()
    values = {
        "imitate": -logps.sum(1) / lengths,
        "reinforce": -advantage * (importance * logps).sum(1) / lengths,
        "prospect": -advantage.abs() * torch.sigmoid(config.beta * ratio * advantage.sign()),
        "prefer": -F.logsigmoid(config.beta * (ratio - ratio.roll(-1))) - logps.sum(1) / lengths,
    }
    own = sum((term == number).float() * values[name] for number, name in enumerate(TERMS))
    away = (inputs["reference"] - logps) * mask
    k3 = ((away.clamp(max=10).exp() - away - 1) * mask).sum(1) / lengths
    return weight * (own + config.anchor * k3)


def make_weighted_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Experience],
    order: Sequence[int],
    config: TrainingConfig,
    common: dict[str, Any],
) -> WeightedTrainer:
    """Make a trainer for `sft`, `pg` or `mixed` that reads the rows roughly in this `order`.

    Rows with prompts of similar length are read together. Rows are not grouped by the length of answers, because batches of
    short answers move the policy more than batches of long ones.
    """
    pad = pad_id(tokenizer)
    settings = SFTConfig(
        **common, max_length=None, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = WeightedTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(_make_examples(model, rows, config)),
        processing_class=tokenizer,
        data_collator=lambda chosen: _collate(chosen, pad),
    )
    trainer.terms = config
    trainer.usual_length = sum(len(row.completion_ids) for row in rows) / len(rows)
    trainer.order = group_by_length(order, [len(row.prompt_ids) for row in rows], len(order) // common["max_steps"])
    return trainer


def choose_term(row: Experience, objective: str) -> str:
    """Return the loss term that a row's feedback supports under an objective."""
    match objective:
        case "sft":
            return "imitate"
        case "pg":
            return "imitate" if row.logprobs is None else "reinforce"
        case _ if row.rejected_ids is not None:
            return "prefer"
        case _:
            return choose_term(row, "pg") if row.logprobs is not None or row.advantage > 0 else "prospect"


def _make_examples(model: Any, rows: Sequence[Experience], config: TrainingConfig) -> list[dict[str, Any]]:
    """Make one example per row, including the rejected answer if it has one. Compute the base's log-probabilities once."""
    chosen = token_rows(rows)
    terms = [choose_term(row, config.objective) for row in rows]
    rejected = [row.rejected_ids if term == "prefer" else None for row, term in zip(rows, terms, strict=True)]
    with as_base(model):
        references = batched_logprobs(model, chosen)
        below = iter(
            batched_logprobs(model, [(row.prompt_ids, ids) for row, ids in zip(rows, rejected, strict=True) if ids])
        )
    return [
        {
            "prompt": [*row.prompt_ids],
            "completion": [*row.completion_ids],
            "rejected": [*(ids or ())],
            "reference": reference.tolist(),
            "rejected_reference": next(below).tolist() if ids else [],
            "behaviour": [*(row.logprobs or reference.tolist())],
            "advantage": row.advantage,
            "weight": row.weight,
            "term": TERMS.index(term),
        }
        for row, ids, reference, term in zip(rows, rejected, references, terms, strict=True)
    ]


def _collate(examples: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    ids, labels = [], []
    per_token: dict[str, list[torch.Tensor]] = {"reference": [], "behaviour": []}
    per_row: dict[str, list[float]] = {"advantage": [], "weight": [], "term": []}
    for example in examples:
        parts = [(example["completion"], example)]
        if example["rejected"]:
            below = example["rejected_reference"]
            lower = {"reference": below, "behaviour": below, "weight": 0.0}
            parts.append((example["rejected"], example | lower))
        for answer, values in parts:
            ids.append(torch.tensor(example["prompt"] + answer))
            labels.append(torch.tensor([-100] * len(example["prompt"]) + answer))
            for name, column in per_token.items():
                column.append(torch.tensor([0.0] * (len(example["prompt"]) - 1) + list(values[name])))
            for name, scalars in per_row.items():
                scalars.append(values[name])
    found = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    found |= {name: pad_sequence(column, batch_first=True) for name, column in per_token.items()}
    return found | {name: torch.tensor(scalars) for name, scalars in per_row.items()}
