"""Drift: whether people have come to want the opposite of what a policy learned from them, and since when.

How much likelier a policy makes an answer than its base does is the reward that it has learned (Rafailov et al., 2023,
"Direct Preference Optimization", arXiv:2305.18290). Where that was right about most opinions before some moment and is wrong
about most after it, tastes have changed: what was said before is no longer evidence, neither for training nor for the gate.
The same the other way round, where the policy has already turned. It knows no database and no objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binomtest

from bot.config import Config
from learning.data.experience import Experience
from learning.data.selection import cap_people
from learning.judging.evaluation import batched_logprobs, token_rows
from learning.models.trainable import base_of

if TYPE_CHECKING:
    from learning.models.trainable import Model

RIGHT = 0.001  # how often a coin may look like the side on which the policy was right,
WRONG = 0.02  # and like the side on which it was wrong
FEWEST_OPINIONS = 16  # opinions on one side of it
WINDOW = 48  # opinions before it that are looked at, or as many as came after it where those are more
STEP = 4  # opinions between the moments that are tried


@dataclass(frozen=True)
class Drift:
    """The first answer that still counts, and whether the policy holds with what people wanted before it."""

    since: int
    against: bool


def detect_drift(config: Config, base_model: str, policy: "Model", rated: Sequence[Experience]) -> Drift | None:
    """Whether, and since when, people want the opposite of what a policy learned from answers (oldest first)."""
    rows = token_rows(rated)
    own = batched_logprobs(policy, rows)
    with base_of(config, base_model, policy) as model:
        base = batched_logprobs(model, rows)
    learned = np.array([float((mine - other).sum()) for mine, other in zip(own, base, strict=True)])
    liked = np.array([one.reward > 0 for one in rated])
    return find_change_point(learned, liked, [one.opinion_holders for one in rated], config.rewards.person_cap)


def find_change_point(
    learned: np.ndarray, liked: np.ndarray, opinions: Sequence[tuple[str, ...]], cap: float
) -> Drift | None:
    """Where people came to want the opposite, if they did: from learned rewards (n, nats) and whether each answer was
    liked (n, bool), oldest first.

    On one side of the moment the reward must be right about most answers, if one number parts what is liked from what is
    not, and on the other side wrong about most, both beyond chance (binomial tests). `opinions` names whose opinions each
    answer got: nobody's make up more than a share `cap` of a side.
    """
    found: list[tuple[int, Drift]] = []
    if len(learned) == 0 or not np.ptp(learned):  # nothing was learned yet
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
    """The reward from which on answers are best taken to be liked."""
    order = np.sort(learned)
    right = ((learned[None, :] >= order[:, None]) == liked[None, :]).mean(1)
    return float(order[np.argmax(right)])


def _binomial_p_value(right: np.ndarray, weights: np.ndarray, way: str) -> float:
    """How often a coin would be right so often (`greater`), or so seldom (`less`)."""
    return float(binomtest(round(weights @ right), round(weights.sum()), 0.5, way).pvalue)
