"""RewardHead: predict from few reactions whether people like an answer, and tell how sure that is.

It averages Bayesian logistic regressions on small sets of the features of an answer: each feature, each pair, and each group
of features. Each regression counts in proportion to its evidence, so that one that explains the reactions soon outweighs the
rest. Hoeting et al. (1999), "Bayesian Model Averaging: A Tutorial".

`e_value` is the ratio of that evidence to the evidence of a constant rate of approval. It is what a bettor has who bet on
each reaction, before learning from it, at the odds of that rate. So by luck it exceeds 1/p with a chance of about p.
Shafer (2021), "Testing by Betting".
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learning.judging.logistic import Posteriors, fit_posteriors

PRIOR_SD = 2.0  # of a coefficient, in log odds for one standard deviation of the feature
SHARES = (0.4, 0.4, 0.2)  # prior probability of single features, of pairs and of groups
KEPT_CAPITAL = 0.5  # what the bettor never bets: without it a head on reactions by lot is believed too often
NEGLIGIBLE = 1e-3  # regressions with a smaller share of the evidence are left out


@dataclass(frozen=True)
class FeatureSet:
    """Some features, by their numbers, with their posterior and their share of the evidence."""

    features: tuple[int, ...]
    mean: np.ndarray
    covariance: np.ndarray
    share: float

    def predict(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the variance (n,) of the log odds that answers at `places` (n × features) are liked."""
        design = np.hstack([np.ones((len(places), 1)), places[:, self.features]])
        return design @ self.mean, np.einsum("nd,de,ne->n", design, self.covariance, design)


@dataclass(frozen=True)
class RewardHead:
    """A fitted head: the sets of features that matter, and the e-value against a constant rate of approval."""

    sets: tuple[FeatureSet, ...]
    e_value: float

    @classmethod
    def fit(
        cls,
        places: np.ndarray,
        liked: np.ndarray,
        weights: np.ndarray,
        groups: Sequence[int],
        offset: np.ndarray | float = 0.0,
        priors: Sequence[float] = SHARES,
    ) -> "RewardHead":
        """Fit a head to the reactions to n answers.

        `places` is (n × features), in groups of the sizes `groups`; `liked` (n,) has 0 and 1; `weights` (n,), in (0, 1].
        The head adds to the log odds `offset` (n,). `priors` are the prior probabilities of single features, of pairs and of
        groups.
        """
        liked = liked.astype(float)
        found: list[tuple[tuple[int, ...], np.ndarray, np.ndarray, float]] = []
        for share, subsets in zip(priors, _list_subsets(groups, np.ptp(places, axis=0) > 0), strict=True):
            total = sum(len(same) for same in subsets)
            for same in subsets if total and share else ():
                columns = np.array(same, dtype=int)
                prior_sd = PRIOR_SD / max(1, columns.shape[1] - 1) ** 0.5
                fitted = fit_posteriors(places.T[columns].transpose(0, 2, 1), liked, weights, prior_sd, offset)
                evidence = fitted.log_evidence + np.log(share / total)
                found += zip(same, fitted.means, fitted.covariances, evidence, strict=True)
        constant = _fit_constant(liked, weights, offset).log_evidence[0]
        evidence = np.array([one[3] for one in found])
        best = evidence.max()
        shares = np.exp(evidence - best)
        won = float(np.exp(min(best + np.log(shares.sum()) - constant, 700.0)))
        shares /= shares.sum()
        kept = shares >= min(NEGLIGIBLE, shares.max())
        scale = shares[kept].sum()
        sets = [
            FeatureSet(one[0], one[1], one[2], float(share / scale))
            for one, share, keep in zip(found, shares, kept, strict=True)
            if keep
        ]
        return cls(tuple(sorted(sets, key=lambda one: -one.share)), KEPT_CAPITAL + (1 - KEPT_CAPITAL) * won)

    def predict(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the standard deviation (n,) of the log odds that answers at `places` are liked."""
        means, variances = zip(*(one.predict(places) for one in self.sets), strict=True)
        shares = np.array([one.share for one in self.sets])
        mean = shares @ np.array(means)
        spread = shares @ (np.array(variances) + (np.array(means) - mean) ** 2)
        return mean, np.sqrt(spread)

    def draw(self, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the log odds (n,) that answers are liked, under one draw from the posterior."""
        drawn = self.sets[rng.choice(len(self.sets), p=[one.share for one in self.sets])]
        design = np.hstack([np.ones((len(places), 1)), places[:, drawn.features]])
        return design @ rng.multivariate_normal(drawn.mean, drawn.covariance)

    @property
    def coefficients(self) -> dict[int, float]:
        """The mean coefficient of each feature that is in any of the sets, in log odds per standard deviation."""
        found: dict[int, float] = {}
        for one in self.sets:
            for feature, value in zip(one.features, one.mean[1:], strict=True):
                found[feature] = found.get(feature, 0.0) + one.share * float(value)
        return found

    def as_json(self) -> dict[str, Any]:
        """Return the head as JSON values."""
        sets = [[[*one.features], one.mean.tolist(), one.covariance.tolist(), one.share] for one in self.sets]
        return {"e_value": self.e_value, "sets": sets}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RewardHead":
        """Return the head that `as_json` gave."""
        sets = [
            FeatureSet(tuple(features), np.array(mean), np.array(covariance), share)
            for features, mean, covariance, share in values["sets"]
        ]
        return cls(tuple(sets), values["e_value"])


def _fit_constant(liked: np.ndarray, weights: np.ndarray, offset: np.ndarray | float) -> Posteriors:
    return fit_posteriors(np.zeros((1, len(liked), 0)), liked, weights, 1.0, offset)


def _list_subsets(groups: Sequence[int], varies: np.ndarray) -> Iterator[list[list[tuple[int, ...]]]]:
    """Yield the single features, the pairs, and the groups with their union; each as lists of sets of one size.

    Features that are the same in all answers (`varies` (features,) is False) are in none of the sets.
    """
    used = np.flatnonzero(varies).tolist()
    yield [[(one,) for one in used]]
    yield [list(itertools.combinations(used, 2))]
    ends = [*itertools.accumulate(groups, initial=0)]
    whole = [tuple(one for one in used if start <= one < end) for start, end in itertools.pairwise(ends)]
    yield [[one] for one in dict.fromkeys([*whole, tuple(used)])]
