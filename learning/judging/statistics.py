"""Statistics: intervals, areas under ROC curves, and calibration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95  # confidence level of intervals


class Interval(NamedTuple):
    """A figure, and the limits of its interval."""

    value: float
    low: float
    high: float


class Bin(NamedTuple):
    """A bin of similar chances: their mean, the share that came true, and their number."""

    chance: float
    came_true: float
    size: int


def accuracy(values: np.ndarray, signs: np.ndarray) -> float:
    """Return how often a liked answer has a higher value than a disliked one; ties count half (area under the ROC curve)."""
    differences = values[signs > 0][:, None] - values[signs < 0][None, :]
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


def bootstrap(
    statistic: Callable[[np.ndarray], float], signs: np.ndarray, confidence: float, seed: int, draws: int = 2000
) -> Interval:
    """Return `statistic` over all rows, with a percentile interval over resampled rows (stratified by sign)."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(signs == sign) for sign in np.unique(signs)]
    drawn = [statistic(np.concatenate([rng.choice(group, len(group)) for group in groups])) for _ in range(draws)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(statistic(np.arange(len(signs))), float(low), float(high))


def unit_bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    values: np.ndarray,
    signs: np.ndarray,
    units: Sequence[str],
    seed: int,
    draws: int = 2000,
) -> tuple[float | None, float | None, float | None]:
    """Return a statistic of values and signs (n,) with its interval over resampled units, each with all of its rows.

    All three are None if all signs are equal.
    """
    if len(np.unique(signs)) < 2:
        return None, None, None
    names = np.array(units)
    groups = [np.flatnonzero(names == unit) for unit in dict.fromkeys(units)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        pick = np.concatenate([groups[index] for index in rng.integers(len(groups), size=len(groups))])
        if len(np.unique(signs[pick])) == 2:
            drawn.append(statistic(values[pick], signs[pick]))
    if not drawn:
        return statistic(values, signs), None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return statistic(values, signs), float(low), float(high)


def mean_interval(values: Sequence[float], seed: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of `values` with its bootstrap interval."""
    array = np.asarray(values, dtype=float)
    return bootstrap(lambda pick: float(array[pick].mean()), np.ones(len(array)), confidence, seed)


def calibration(chances: np.ndarray, came_true: np.ndarray, bins: int = 10) -> list[Bin]:
    """Return the non-empty bins of chances (n,) and their outcomes (n,)."""
    bin_of = np.minimum((chances * bins).astype(int), bins - 1)
    return [
        Bin(float(chances[bin_of == one].mean()), float(came_true[bin_of == one].mean()), int((bin_of == one).sum()))
        for one in np.unique(bin_of)
    ]


def calibration_error(chances: np.ndarray, came_true: np.ndarray) -> float:
    """Return the mean difference between chances and outcomes, over ten bins."""
    return sum(abs(said - true) * count for said, true, count in calibration(chances, came_true)) / len(chances)
