"""Statistics: intervals, areas under ROC curves, and calibration."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95  # confidence level of intervals
DRAWS = 2000  # samples of a bootstrap
AT_ONCE = 2**22  # counts of rows in memory


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


def accuracy(values: np.ndarray, signs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return how often a liked answer has a higher value than a disliked one; ties count half (area under the ROC curve).

    `values` and `signs` are (n,). `weights` (… × n) are how often each answer counts; the result has its other axes.
    """
    weights = np.ones(len(values)) if weights is None else weights
    order = np.argsort(values, kind="stable")
    begins = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)  # of each run of equal values
    liked, disliked = (
        np.add.reduceat(np.where(kind, weights, 0.0)[..., order], begins, axis=-1) for kind in (signs > 0, signs < 0)
    )
    below = disliked.cumsum(-1) - disliked
    wins = (liked * (below + disliked / 2)).sum(-1)
    return wins / (liked.sum(-1) * disliked.sum(-1))


def margin(values: np.ndarray, signs: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the mean of `values` over liked answers minus that over disliked ones. The arrays are as in `accuracy`."""
    weights = np.ones(len(values)) if weights is None else weights
    liked, disliked = (np.where(kind, weights, 0.0) for kind in (signs > 0, signs < 0))
    return (liked @ values) / liked.sum(-1) - (disliked @ values) / disliked.sum(-1)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], signs: np.ndarray, confidence: float, seed: int, draws: int = DRAWS
) -> Interval:
    """Return a statistic over all rows, with a percentile interval over resampled rows (stratified by sign).

    `statistic` is told how often each row counts (… × n) and returns the value of each such sample.
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(signs == sign) for sign in np.unique(signs)]

    def draw(count: int) -> np.ndarray:
        times = np.empty((count, len(signs)))
        for group in groups:
            times[:, group] = rng.multinomial(len(group), [1 / len(group)] * len(group), size=count)
        return statistic(times)

    low, high = _percentiles(np.concatenate([draw(count) for count in _split(draws, len(signs))]), confidence)
    return Interval(float(statistic(np.ones(len(signs)))), low, high)


def unit_bootstrap(
    statistic: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    values: np.ndarray,
    signs: np.ndarray,
    units: Sequence[str],
    seed: int,
    draws: int = DRAWS,
) -> tuple[float | None, float | None, float | None]:
    """Return a statistic of values and signs (n,) with its interval over resampled units, each with all of its rows.

    `statistic` is one such as `accuracy`. All three are None if all signs are equal.
    """
    if len(np.unique(signs)) < 2:
        return None, None, None
    value = float(statistic(values, signs, np.ones(len(signs))))
    names, unit_of = np.unique(np.array(units), return_inverse=True)
    rng = np.random.default_rng(seed)

    def draw(count: int) -> np.ndarray:
        times = rng.multinomial(len(names), [1 / len(names)] * len(names), size=count)[:, unit_of].astype(float)
        has_both = (times[:, signs > 0].sum(1) > 0) & (times[:, signs < 0].sum(1) > 0)
        return statistic(values, signs, times[has_both])

    drawn = np.concatenate([draw(count) for count in _split(draws, len(signs))])
    return (value, *_percentiles(drawn, CONFIDENCE)) if len(drawn) else (value, None, None)


def _split(draws: int, rows: int) -> list[int]:
    """Split so many draws of so many rows into parts that need little memory."""
    size = max(1, AT_ONCE // max(rows, 1))
    return [min(size, draws - start) for start in range(0, draws, size)]


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def mean_interval(values: Sequence[float], seed: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of `values` with its bootstrap interval."""
    array = np.asarray(values, dtype=float)
    return bootstrap(lambda times: times @ array / len(array), np.ones(len(array)), confidence, seed)


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
