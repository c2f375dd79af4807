"""Drift: detect that people now want the opposite of what a policy learned from them, and since when.

A policy's learned reward for an answer is how much likelier it makes the answer than its base does (Rafailov et al., 2023,
"Direct Preference Optimization", arXiv:2305.18290). If this reward agrees with most opinions before some moment and
disagrees with most after it, tastes have changed: the older opinions are no longer evidence, neither for training nor for
the gate. The reverse also counts: the policy may already have learned the new taste.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest

from bot.config import PolicyConfig, RewardsConfig, ServingConfig
from learning.data.experience import Experience
from learning.data.selection import cap_people
from learning.judging.evaluation import batched_logprobs, token_rows
from learning.models.trainable import base_of

if TYPE_CHECKING:
    from learning.models.trainable import Model

RIGHT = 0.001  # largest p-value of the binomial test on the side where the policy agrees with people
WRONG = 0.02  # largest p-value on the side where it disagrees
FEWEST_OPINIONS = 16  # opinions on each side of a change, at least
WINDOW = 48  # opinions before a change that are tested, or as many as came after it if those are more
STEP = 4  # opinions between the moments that are tried


@dataclass(frozen=True)
class Drift:
    """A change of taste: the index of the first answer after it, and whether the policy learned the taste before it."""

    since: int
    against: bool


def detect_drift(
    policy: PolicyConfig,
    serving: ServingConfig,
    rewards: RewardsConfig,
    base_model: str,
    model: "Model",
    rated: Sequence[Experience],
) -> Drift | None:
    """Return the change of taste that rated answers (oldest first) show against a policy's model, or None."""
    rows = token_rows(rated)
    own = batched_logprobs(model, rows)
    with base_of(policy, serving, base_model, model) as base_policy:
        base = batched_logprobs(base_policy, rows)
    learned = np.array([float((mine - other).sum()) for mine, other in zip(own, base, strict=True)])
    liked = np.array([one.reward > 0 for one in rated])
    return find_change_point(learned, liked, [one.opinion_holders for one in rated], rewards.person_cap)


def find_change_point(
    learned: np.ndarray, liked: np.ndarray, opinions: Sequence[tuple[str, ...]], cap: float
) -> Drift | None:
    """Return the change of taste in learned rewards (n, nats) and likes (n, bool), oldest first, or None.

    A threshold on the reward predicts which answers are liked. Its predictions must be right for most answers on one side of
    the moment, and wrong for most on the other, both beyond chance (binomial tests). `opinions` names the people behind each
    answer's opinions; nobody's opinions make up more than a share `cap` of a side.
    """
    found: list[tuple[int, Drift]] = []
    if len(learned) == 0 or not np.ptp(learned):  # the policy has learned nothing yet
        return None
    for since in range(FEWEST_OPINIONS, len(liked) - FEWEST_OPINIONS + 1, STEP):
        before = slice(max(0, since - max(WINDOW, len(liked) - since)), since)
        sides = before, slice(since, None)
        weights = [cap_people(opinions[side], np.ones(len(liked[side])), cap) for side in sides]
        for right, wrong in ((0, 1), (1, 0)):
            agrees = (learned >= _find_threshold(learned[sides[right]], liked[sides[right]])) == liked
            if (
                _binomial_p_value(agrees[sides[right]], weights[right], "greater") < RIGHT
                and _binomial_p_value(agrees[sides[wrong]], weights[wrong], "less") < WRONG
            ):
                fits = int((agrees == (np.arange(len(liked)) < since)).sum())
                found.append((max(fits, len(liked) - fits), Drift(since, against=right == 0)))
    return max(found, key=lambda one: one[0])[1] if found else None


def _find_threshold(learned: np.ndarray, liked: np.ndarray) -> float:
    """Return the learned reward that separates liked answers (at or above it) from disliked ones best."""
    order = np.sort(learned)
    right = ((learned[None, :] >= order[:, None]) == liked[None, :]).mean(1)
    return float(order[np.argmax(right)])


def _binomial_p_value(right: np.ndarray, weights: np.ndarray, way: str) -> float:
    """Return the p-value of a binomial test that weighted predictions are right more (`greater`) or less (`less`) than half
    of the time.
    """
    return float(binomtest(round(weights @ right), round(weights.sum()), 0.5, way).pvalue)
