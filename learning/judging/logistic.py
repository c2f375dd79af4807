"""Logistic: Bayesian logistic regressions on small sets of features, many at once, with Laplace's approximation.

Each has normal priors, so that it exists for any data. Its evidence (the probability of the outcomes under the model) tells
how well the set of features explains them. MacKay (1992), "The Evidence Framework Applied to Classification Networks".
"""

from dataclasses import dataclass

import numpy as np

STEPS = 25  # of Newton's method, at most
CLOSE = 1e-6  # a step that is smaller ends it
INTERCEPT_SD = 2.0  # prior standard deviation of the intercept, in log odds


@dataclass(frozen=True)
class Posteriors:
    """Normal posteriors of k regressions with d coefficients each, the intercept first.

    `means` is (k, d), `covariances` (k, d, d), and `log_evidence` (k,) in nats.
    """

    means: np.ndarray
    covariances: np.ndarray
    log_evidence: np.ndarray


def fit_posteriors(
    inputs: np.ndarray, liked: np.ndarray, weights: np.ndarray, prior_sd: float, offset: np.ndarray | float = 0.0
) -> Posteriors:
    """Fit k regressions to n outcomes.

    `inputs` is (k, n, features) and may have no features; `liked` (n,) has 0 and 1; `weights` (n,) say how much each outcome
    counts. `prior_sd` is the prior standard deviation of each feature's coefficient, in log odds. `offset` (n,) are log odds
    that are known already, and which the regressions add to.
    """
    count, rows, features = inputs.shape
    design = np.concatenate([np.ones((count, rows, 1)), inputs], axis=2)
    precision = np.array([INTERCEPT_SD**-2] + [prior_sd**-2] * features)
    means = np.zeros((count, features + 1))
    for _ in range(STEPS):
        chances = _compute_chances(design, means, offset)
        gradient = ((weights * (liked - chances))[:, None] @ design)[:, 0] - precision * means
        step = np.linalg.solve(_compute_hessians(design, chances, weights, precision), gradient[..., None])[..., 0]
        means += np.clip(step, -4, 4)  # far from the maximum a whole step may overshoot
        if np.abs(step).max(initial=0.0) < CLOSE:
            break
    logits = (design @ means[..., None])[..., 0] + offset
    hessians = _compute_hessians(design, _compute_chances(design, means, offset), weights, precision)
    likelihood = (weights * (liked * logits - np.logaddexp(0, logits))).sum(1)
    penalty = 0.5 * (precision * means**2).sum(1)
    occam = 0.5 * (np.log(precision).sum() - np.linalg.slogdet(hessians)[1])
    return Posteriors(means, np.linalg.inv(hessians), likelihood - penalty + occam)


def _compute_chances(design: np.ndarray, means: np.ndarray, offset: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-(design @ means[..., None])[..., 0] - offset))


def _compute_hessians(design: np.ndarray, chances: np.ndarray, weights: np.ndarray, precision: np.ndarray) -> np.ndarray:
    curvature = weights * chances * (1 - chances)
    return (design * curvature[..., None]).transpose(0, 2, 1) @ design + np.diag(precision)
