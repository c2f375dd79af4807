"""Reward scores: a reward model's predictions for unseen answers, and their quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learning.data.experience import Experience
from learning.judging.statistics import DRAWS, accuracy, calibration_error, unit_bootstrap

MIN_PER_KIND = 20  # liked, and disliked, answers that a reward model needs


@dataclass(frozen=True)
class ScoredAnswers:
    """Scores, predicted chances of a like, opinions, units and lengths of answers (n,).

    The model did not see the answers' units. Scores are for ranking: the calibration differs between folds, so chances rank
    answers of different folds worse.
    """

    scores: np.ndarray
    chances: np.ndarray
    liked: np.ndarray
    units: list[str]
    words: np.ndarray


def has_enough(rated: Sequence[Experience], folds: int) -> bool:
    """Whether there are enough liked and disliked answers, and enough units, to fit a reward model."""
    liked = sum(one.reward > 0 for one in rated)
    return min(liked, len(rated) - liked) >= MIN_PER_KIND and len({one.unit for one in rated}) >= 2 * folds


def calibrate_scores(scores: np.ndarray, rated: Sequence[Experience], folds: Any) -> tuple[ScoredAnswers, Any]:
    """Return out-of-fold scores (n,) as probabilities, and the fitted calibration for other scores."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    liked, units = np.array([one.reward > 0 for one in rated]), [one.unit for one in rated]
    platt = LogisticRegression(C=1e6)
    chances = cross_val_predict(platt, scores[:, None], liked, groups=units, cv=folds, method="predict_proba")[:, 1]
    words = np.array([len(one.answer.split()) for one in rated])
    return ScoredAnswers(scores, chances, liked, units, words), platt.fit(scores[:, None], liked)


@dataclass(frozen=True)
class Scores:
    """The quality of a reward model.

    It has the area under the ROC curve (AUC) with its 95% interval over units, the AUC of the length alone, and the
    calibration error in ten bins.
    """

    reward_model_auc: float
    reward_model_auc_low: float
    reward_model_auc_high: float
    length_alone_auc: float
    reward_model_calibration_error: float


def score(judged: ScoredAnswers, seed: int, draws: int = DRAWS) -> Scores:
    """Return the quality of a reward model's scores."""
    signs = np.where(judged.liked, 1, -1)
    value, low, high = unit_bootstrap(accuracy, judged.scores, signs, judged.units, seed, draws)
    assert value is not None
    assert low is not None
    assert high is not None  # `has_enough` wants answers of both kinds
    return Scores(
        reward_model_auc=value,
        reward_model_auc_low=low,
        reward_model_auc_high=high,
        length_alone_auc=float(accuracy(judged.words, signs)),
        reward_model_calibration_error=calibration_error(judged.chances, judged.liked),
    )
