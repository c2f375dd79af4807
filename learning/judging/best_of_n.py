"""BestOfN: how many answers the evidence allows to choose from, and the choice among them.

Choosing the answer with the highest predicted reward is nearly the best that any policy can do at its distance from the
plain one (Gui et al., 2024, "BoNBoN Alignment", arXiv:2406.00832), but follows a wrong prediction as eagerly as a right one.
So the number of answers depends on the evidence that the prediction is right, and answers are ranked by a pessimistic score.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEW, MANY = 4, 8  # answers to choose from
FEW_E_VALUE, MANY_E_VALUE = 3.0, 20.0  # the e-values that they need
LEAST_REACTIONS = 12  # fewer never allow a choice
LEAST_OF_A_KIND = 3  # liked answers, and disliked ones
PESSIMISM = 1.0  # standard deviations that are subtracted from a predicted log odds
SOFTNESS = 0.1  # log odds: the temperature of the choice
PLAIN_SHARE = 0.1  # of the answers stay plain samples, so that they show what the choice is worth
HARMFUL = 0.95  # probability that chosen answers are liked less than plain ones, at which no more are chosen


@dataclass(frozen=True)
class Approval:
    """How many answers of a sort were liked and disliked."""

    liked: int = 0
    disliked: int = 0

    @property
    def total(self) -> int:
        """How many there are."""
        return self.liked + self.disliked


def count_candidates(e_value: float, most: int) -> int:
    """Return from how many answers an e-value allows to choose, `most` at most."""
    allowed = 1 if e_value < FEW_E_VALUE else FEW if e_value < MANY_E_VALUE else max(MANY, most)
    return min(allowed, most)


def is_harmful(chosen: Approval, plain: Approval) -> bool:
    """Whether chosen answers are so probably liked less than plain ones that they should not be chosen any more.

    Both rates have a uniform prior; the difference of the posteriors is taken as normal.
    """
    means, variances = zip(*(_describe_rate(one) for one in (chosen, plain)), strict=True)
    return NormalDist().cdf((means[1] - means[0]) / sum(variances) ** 0.5) > HARMFUL


def _describe_rate(one: Approval) -> tuple[float, float]:
    """Return the mean and the variance of the Beta posterior of a rate of approval."""
    a, b = one.liked + 1, one.disliked + 1
    return a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))


def compute_chances(scores: np.ndarray) -> np.ndarray:
    """Return the probability (n,) that each answer is chosen. Equal scores have equal probabilities."""
    weights = np.exp((scores - scores.max()) / SOFTNESS)
    return weights / weights.sum()
