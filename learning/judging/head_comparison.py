"""HeadComparison: whether the reward head can tell more of an answer than its length and its log-probability can.

The head reads twenty features and the embedding. If it ranks answers in unseen conversations no better than two numbers do,
it found nothing beyond them.

The models of different folds start from different shares of liked answers. Their scores put together rank answers worse than
each of them does. So an answer's score is its place among all answers, as the model that did not see it ranks them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bot.memory.embedder import Embedder
from learning.data.experience import Experience
from learning.data.feature_space import FeatureExtractor
from learning.judging.head_reward_model import FOLDS
from learning.judging.reward_scores import has_enough
from learning.judging.statistics import accuracy, unit_bootstrap
from learning.judging.taught_head import describe_answer, fit_head

REPEATS = 5  # ways to divide the units into folds; one way alone may be off by 0.03


@dataclass(frozen=True)
class HeadComparison:
    """Areas under ROC curves (AUC) on the same rated answers, with their 95% intervals over units.

    `length_alone` ranks answers by their number of words. The other two were fitted to answers of other units.
    """

    head_auc: float | None
    head_auc_low: float | None
    head_auc_high: float | None
    length_alone_auc: float | None
    length_alone_auc_low: float | None
    length_alone_auc_high: float | None
    length_and_logprob_auc: float | None
    length_and_logprob_auc_low: float | None
    length_and_logprob_auc_high: float | None


def compare_head(
    judged: Sequence[Experience], embedder: Embedder | None, person_cap: float, seed: int
) -> HeadComparison | None:
    """Compare the head with length and mean log-probability on judged answers, oldest first, without corrections.

    Returns None if there are too few answers.
    """
    if not has_enough(judged, FOLDS):
        return None
    units, signs = [one.unit for one in judged], np.array([1 if one.reward > 0 else -1 for one in judged])
    words = np.array([len(one.answer.split()) for one in judged])
    rankings = (
        _rank_unseen(_make_head_scorer(judged, embedder, person_cap), units, seed),
        words[:, None],
        _rank_unseen(_make_plain_scorer(judged, words, signs), units, seed),
    )
    found = [unit_bootstrap(_mean_accuracy, ranks, signs, units, seed) for ranks in rankings]
    return HeadComparison(*(value for interval in found for value in interval))


Scorer = Callable[[np.ndarray], np.ndarray]  # fits a model to the answers in these rows, and returns the scores of all (n,)


def _rank_unseen(score: Scorer, units: Sequence[str], seed: int) -> np.ndarray:
    """Return the place of each answer among all (n × REPEATS), as a model ranks them that did not see its unit."""
    from scipy.stats import rankdata
    from sklearn.model_selection import GroupKFold

    ranks = np.empty((len(units), REPEATS))
    for repeat in range(REPEATS):
        folds = GroupKFold(FOLDS, shuffle=True, random_state=seed + repeat)
        for seen, unseen in folds.split(ranks, groups=units):
            ranks[unseen, repeat] = rankdata(score(seen))[unseen]
    return ranks


def _make_head_scorer(judged: Sequence[Experience], embedder: Embedder | None, person_cap: float) -> Scorer:
    extractor = FeatureExtractor(embedder)
    raw = extractor.extract([describe_answer(one) for one in judged])

    def score(seen: np.ndarray) -> np.ndarray:
        head = fit_head([judged[row] for row in seen], (), extractor, person_cap)
        return np.zeros(len(judged)) if head is None else head.predict(raw)[0]

    return score


def _make_plain_scorer(judged: Sequence[Experience], words: np.ndarray, signs: np.ndarray) -> Scorer:
    """Score by length and mean log-probability. One that is unknown is the mean of the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    logprobs = np.array([np.nan if one.mean_logprob is None else one.mean_logprob for one in judged])
    is_known = np.isfinite(logprobs)
    usual = logprobs[is_known].mean() if is_known.any() else 0.0
    inputs = np.column_stack([np.log1p(words), np.where(is_known, logprobs, usual)])

    def score(seen: np.ndarray) -> np.ndarray:
        if len(np.unique(signs[seen])) < 2:
            return np.zeros(len(judged))
        model = make_pipeline(StandardScaler(), LogisticRegression())
        return model.fit(inputs[seen], signs[seen]).decision_function(inputs)

    return score


def _mean_accuracy(ranks: np.ndarray, signs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.mean([accuracy(column, signs, weights) for column in ranks.T], axis=0)
    return found
