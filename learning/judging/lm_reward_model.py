"""LmRewardModel: predict whether people like an answer, with the policy's base model and a scalar head.

TRL's RewardTrainer fits it to pairs of a liked and a disliked answer (Bradley and Terry, 1952, "Rank Analysis of Incomplete
Block Designs"), to the same prompt if there are such pairs, otherwise to any two prompts. It reads every word, whereas
`RewardModel` reads an embedding. Each fold takes a training run. It serves the report; nothing is trained on its output.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from bot.config import TrainingConfig
from learning.data.experience import Experience
from learning.judging.evaluation import pad_batch, split_batches, token_rows
from learning.judging.reward_scores import ScoredAnswers, calibrate_scores, has_enough

FOLDS = 3
STEPS = 60  # maximum steps of a run
PASSES = 12  # maximum passes over the pairs


class LmRewardModel:
    """A reward model from a language model. `fit` trains it on rated answers; `predict_chances` scores others."""

    def __init__(self, base_model: str, training: TrainingConfig, seed: int):
        self.base_model = base_model
        self.training = training
        self.seed = seed
        self._rated: Sequence[Experience] = ()
        self._fitted: Any = None

    def fit(self, rated: Sequence[Experience]) -> ScoredAnswers | None:
        """Fit to rated answers. Return their out-of-fold scores, or None if there are too few answers."""
        from sklearn.model_selection import GroupKFold

        if not has_enough(rated, FOLDS):
            return None
        scores = np.empty(len(rated))
        folds = GroupKFold(FOLDS, shuffle=True, random_state=self.seed)
        for seen, unseen in folds.split(rated, groups=[one.unit for one in rated]):
            scores[unseen] = self._compute_scores(self._train([rated[row] for row in seen]), [rated[row] for row in unseen])
        self._rated, self._fitted = rated, None
        judged, self._platt = calibrate_scores(scores, rated, folds)
        return judged

    def predict_chances(self, answers: Sequence[Experience]) -> np.ndarray:
        """Return the probability (n,) that each answer is liked."""
        if self._fitted is None:  # it takes a run, so it is made when it is first asked
            self._fitted = self._train(self._rated)
        return self._platt.predict_proba(self._compute_scores(self._fitted, answers)[:, None])[:, 1]

    def _train(self, rated: Sequence[Experience]) -> Any:
        import torch
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed
        from trl import RewardConfig, RewardTrainer

        from learning.models.batching import fit_to_machine, machine_arguments
        from learning.models.reporter import report_progress

        set_seed(self.seed)
        model = AutoModelForSequenceClassification.from_pretrained(self.base_model, num_labels=1, dtype=torch.float32)
        rank = self.training.lora_rank
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="SEQ_CLS")
        rows = make_pairs(rated, random.Random(self.seed))
        batch_size = min(self.training.batch_size, len(rows))
        adapted = get_peft_model(model, settings)
        pairwise = self.training.model_copy(update={"objective": "dpo", "weights": "lora"})  # two answers a row
        longest = max(len(ids) for row in rows for ids in row.values())
        trainer = RewardTrainer(
            model=adapted,
            args=RewardConfig(
                output_dir="unused",
                max_steps=max(1, min(STEPS, PASSES * len(rows) // batch_size)),
                learning_rate=self.training.learning_rate,
                max_length=None,
                seed=self.seed,
                **machine_arguments(fit_to_machine(adapted, pairwise, batch_size, longest)),
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(self.base_model),
        )
        report_progress(trainer, "reward model", lambda *_: None)
        trainer.train()
        return trainer.model.eval()

    def _compute_scores(self, model: Any, answers: Sequence[Experience]) -> np.ndarray:
        import torch

        found: list[float] = []
        with torch.no_grad():
            for batch in split_batches(token_rows(answers)):
                inputs = pad_batch(batch, model.device, model.config.pad_token_id)
                found += model(**inputs).logits[:, 0].float().tolist()
        return np.array(found)


def make_pairs(rated: Sequence[Experience], rng: random.Random) -> list[dict[str, list[int]]]:
    """Pair each answer with one of the opposite opinion, to the same prompt if there is any."""
    sides: dict[bool, list[Experience]] = {True: [], False: []}
    for one in rated:
        sides[one.reward > 0].append(one)
    found = []
    for one in rated:
        likes = one.reward > 0
        others = [other for other in sides[not likes] if other.prompt_ids == one.prompt_ids] or sides[not likes]
        pair = one, rng.choice(others)
        liked, disliked = pair if likes else pair[::-1]
        found.append(
            {
                "chosen_ids": [*liked.prompt_ids, *liked.completion_ids],
                "rejected_ids": [*disliked.prompt_ids, *disliked.completion_ids],
            }
        )
    return found
