"""RewardModel: predict whether people like an answer, from frozen sentence embeddings of the answer and the question.

It is a logistic regression on the answer's embedding, its product with the question's, their similarity, and the length of
the answer. The regularisation strength is chosen on unseen questions, and the probabilities are calibrated on them (Platt,
1999, "Probabilistic Outputs for Support Vector Machines"). It serves the report; nothing is trained on its output.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from bot.config import Config
from bot.memory.embedder import Embedder
from learning.data.experience import Experience
from learning.judging.reward_scores import ScoredAnswers, calibrate_scores, has_enough

FOLDS = 5
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # inverse regularisation strengths that are tried
TYPICAL = 4.0  # logarithm of a typical answer's number of words


class AnyRewardModel(Protocol):
    """The protocol of all kinds of reward model."""

    def fit(self, rated: Sequence[Experience]) -> ScoredAnswers | None:
        """Fit to rated answers. Return their out-of-fold scores, or None if there are too few answers."""

    def predict_chances(self, answers: Sequence[Experience]) -> np.ndarray:
        """Return the probability (n,) that each answer is liked."""


class RewardModel:
    """A reward model from embeddings. `fit` trains it on rated answers; `predict_chances` scores others."""

    def __init__(self, embedder: Embedder, seed: int):
        self.embedder = embedder
        self.seed = seed
        self._fitted: Any = None

    def fit(self, rated: Sequence[Experience]) -> ScoredAnswers | None:
        """Fit to rated answers. Return their out-of-fold scores, or None if there are too few answers."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold, cross_val_predict

        if not has_enough(rated, FOLDS):
            return None
        liked, units = np.array([one.reward > 0 for one in rated]), [one.unit for one in rated]
        inputs = self._make_inputs(rated)
        folds = GroupKFold(FOLDS, shuffle=True, random_state=self.seed)
        scored = []
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
            scores = cross_val_predict(model, inputs, liked, groups=units, cv=folds, method="decision_function")
            scored.append((_log_loss(scores, liked), strength, scores))
        _, strength, scores = min(scored, key=lambda row: row[0])
        self._fitted = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(inputs, liked)
        judged, self._platt = calibrate_scores(scores, rated, folds)
        return judged

    def predict_chances(self, answers: Sequence[Experience]) -> np.ndarray:
        """Return the probability (n,) that each answer is liked."""
        scores = self._fitted.decision_function(self._make_inputs(answers))
        return self._platt.predict_proba(scores[:, None])[:, 1]

    def _make_inputs(self, answers: Sequence[Experience]) -> np.ndarray:
        asked = self.embedder.encode([one.question for one in answers])
        said = self.embedder.encode([one.answer for one in answers])
        near = (asked * said).sum(1, keepdims=True)
        # Length gets the weight of a whole embedding, because it influences people most.
        length = (np.log1p([[len(one.answer.split())] for one in answers]) - TYPICAL) / 2
        return np.hstack([said, asked * said, near, length, length**2])


def make_reward_model(config: Config, embedder: Embedder | None, base_model: str) -> AnyRewardModel | None:
    """Make the kind of `reward_model.kind`. Return None if that kind needs an embedder and there is none."""
    match config.reward_model.kind:
        case "lm":
            from learning.judging.lm_reward_model import LmRewardModel

            return LmRewardModel(base_model, config.training, config.seed)
        case "head":
            from learning.judging.head_reward_model import HeadRewardModel

            return HeadRewardModel(embedder, config.rewards.person_cap, config.seed)
        case _:
            return None if embedder is None else RewardModel(embedder, config.seed)


def _log_loss(scores: np.ndarray, liked: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    chances = LogisticRegression(C=1e6).fit(scores[:, None], liked).predict_proba(scores[:, None])
    return float(log_loss(liked, chances[:, 1]))
