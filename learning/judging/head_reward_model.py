"""HeadRewardModel: predict whether people like an answer, with the reward head that also chooses among answers.

It shows how good the head is on conversations that it was not fitted to. A fit takes a second, also without an embedder. It
serves the report; nothing is trained on its output.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bot.memory.embedder import Embedder
from learning.data.experience import Experience
from learning.data.feature_space import FeatureExtractor
from learning.judging.reward_scores import ScoredAnswers, calibrate_scores, has_enough
from learning.judging.taught_head import describe_answer, fit_head

FOLDS = 5


class HeadRewardModel:
    """A reward model from a reward head. `fit` fits it to rated answers; `predict_chances` scores others.

    No person counts for more than a share `person_cap`.
    """

    def __init__(self, embedder: Embedder | None, person_cap: float, seed: int):
        self.person_cap = person_cap
        self.seed = seed
        self._extractor = FeatureExtractor(embedder)
        self._score: Any = None

    def fit(self, rated: Sequence[Experience]) -> ScoredAnswers | None:
        """Fit to rated answers, oldest first, corrections apart. Return their out-of-fold scores.

        Returns None if there are too few answers.
        """
        from sklearn.model_selection import GroupKFold

        judged = [one for one in rated if not one.is_correction]
        if not has_enough(judged, FOLDS):
            return None
        scores = np.empty(len(judged))
        folds = GroupKFold(FOLDS, shuffle=True, random_state=self.seed)
        for seen, unseen in folds.split(judged, groups=[one.unit for one in judged]):
            score = self._fit_head([judged[row] for row in seen])
            if score is None:  # nearly all answers of a kind are in one unit
                return None
            scores[unseen] = score([judged[row] for row in unseen])
        self._score = self._fit_head(judged)
        found, self._platt = calibrate_scores(scores, judged, folds)
        return found

    def predict_chances(self, answers: Sequence[Experience]) -> np.ndarray:
        """Return the probability (n,) that each answer is liked."""
        return self._platt.predict_proba(self._score(answers)[:, None])[:, 1]

    def _fit_head(self, judged: Sequence[Experience]) -> Callable[[Sequence[Experience]], np.ndarray] | None:
        """Fit a head, and return the function that scores answers: the log odds beyond the mean of the judged answers.

        The share of liked answers differs between folds, and must not rank the answers of one fold below those of another.
        """
        head = fit_head(judged, (), self._extractor, self.person_cap)
        if head is None:
            return None

        def predict(answers: Sequence[Experience]) -> np.ndarray:
            return head.predict(self._extractor.extract([describe_answer(one) for one in answers]))[0]

        usual = predict(judged).mean()
        return lambda answers: predict(answers) - usual
