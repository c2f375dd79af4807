"""Permutation tests: p-values of sums. Pure functions of numbers.

A permutation test (Fisher, 1935, "The Design of Experiments") is exact for any number of values; a bootstrap interval of few
values is too narrow. Whole units are permuted, and only within their stratum.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

DRAWS = 1000  # minimum number of random permutations, because people are shown the p-values
ENOUGH_AS_LARGE = 10  # drawing stops after this many draws as large as the observed sum; this many are expected at the level
MAX_DRAWS = 2_000_000  # maximum number of random permutations


def permutation_p_value(
    values: np.ndarray,
    signs: np.ndarray,
    units: Sequence[Hashable],
    strata: Sequence[Hashable],
    seed: int,
    level: float = ENOUGH_AS_LARGE / DRAWS,
) -> float:
    """Return the one-sided p-value of the sum of `values` * `signs` (both (n,)) when the signs are permuted.

    Rows of the same unit (`units`, (n,)) keep their signs together. Two units may exchange their signs if they have the same
    stratum (`strata`, (n,)) and the same number of rows. The p-value is precise enough to be compared with `level`.
    """
    groups = [(signs[rows], values[rows].ravel()) for rows in _group_exchangeable(units, strata)]
    movable = [one for one in groups if len(one[0]) > 1]
    fixed = sum(float(given.ravel() @ moved) for given, moved in groups if len(given) == 1)  # they can exchange with none

    def draw(rng: np.random.Generator) -> np.ndarray:
        drawn = np.full(DRAWS, float(fixed))
        for given, moved in movable:
            order = rng.permuted(np.tile(np.arange(len(given)), (DRAWS, 1)), axis=1)
            drawn += given[order].reshape(DRAWS, -1) @ moved
        return drawn

    return _p_value(float(signs @ values), draw, seed, level)


def sign_flip_p_value(values: np.ndarray, seed: int, level: float = ENOUGH_AS_LARGE / DRAWS) -> float:
    """Return the one-sided p-value of the sum of `values` (n,) when each value has a random sign."""
    if len(values) < 2:
        return 1.0
    return _p_value(float(values.sum()), lambda rng: rng.choice((-1.0, 1.0), (DRAWS, len(values))) @ values, seed, level)


def _p_value(seen: float, draw: Callable[[np.random.Generator], np.ndarray], seed: int, level: float) -> float:
    """Return the share of draws that are at least as large as `seen`.

    Drawing stops early if the result is clear (Besag and Clifford, 1991, "Sequential Monte Carlo p-values").
    """
    if not math.isfinite(seen):
        return 1.0
    rng = np.random.default_rng(seed)
    drawn = as_large = 0
    while drawn < min(MAX_DRAWS, ENOUGH_AS_LARGE / level) and as_large < ENOUGH_AS_LARGE:
        as_large += int((draw(rng) >= seen - 1e-9).sum())
        drawn += DRAWS
    return (1 + as_large) / (1 + drawn)


def least_p_value(signs: np.ndarray, units: Sequence[Hashable], strata: Sequence[Hashable]) -> float:
    """Return the smallest p-value that any values can give: 1 / the number of different permutations."""
    ways = 0.0
    for rows in _group_exchangeable(units, strata):
        alike = Counter(tuple(unit) for unit in signs[rows].tolist())
        ways += math.lgamma(len(rows) + 1) - sum(math.lgamma(count + 1) for count in alike.values())
    return math.exp(-ways)


def _group_exchangeable(units: Sequence[Hashable], strata: Sequence[Hashable]) -> list[np.ndarray]:
    """Group units that may exchange their signs. Each group is an array of row numbers (units × rows of each unit)."""
    of_unit: dict[tuple[Hashable, Hashable], list[int]] = defaultdict(list)
    for row, key in enumerate(zip(units, strata, strict=True)):
        of_unit[key].append(row)
    groups: dict[tuple[Hashable, int], list[list[int]]] = defaultdict(list)
    for (_, stratum), rows in of_unit.items():
        groups[stratum, len(rows)].append(rows)
    return [np.array(rows) for rows in groups.values()]
