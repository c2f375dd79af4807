"""Rewards: feedback on a turn -> one number in [-1, 1]. Pure functions of the record (law 2).

Silence is not disapproval: without standing feedback there is no reward, which is not a reward of zero.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bot.config import RewardsConfig
from bot.feedback import standing
from bot.types import Feedback, FeedbackKind


@dataclass(frozen=True)
class Reward:
    """What a turn earned, from whom, and the feedback that says so."""

    value: float
    opinions: dict[str, float]
    feedback_ids: tuple[str, ...]


def reward(feedback: Iterable[Feedback], asker_id: str, config: RewardsConfig) -> Reward | None:
    """The weighted mean over people of what each one's standing feedback is worth, or None where nothing stands.

    Each person's acts add up and are capped to [-1, 1], so that nobody counts more than once; the asker weighs more than
    a bystander. The order of `feedback` does not matter.
    """
    worth = {
        FeedbackKind.APPROVAL: config.approval,
        FeedbackKind.DISAPPROVAL: config.disapproval,
        FeedbackKind.REGENERATE: config.regenerate,
        FeedbackKind.CORRECTION: config.correction,
    }
    counted = [row for row in standing(feedback) if row.kind in worth or row.kind == FeedbackKind.RATING]
    if not counted:
        return None
    sums: dict[str, float] = defaultdict(float)
    for row in counted:
        sums[row.user_id] += worth.get(row.kind, row.value or 0.0)
    opinions = {user: max(-1.0, min(1.0, total)) for user, total in sorted(sums.items())}
    weights = {user: config.asker_weight if user == asker_id else config.bystander_weight for user in opinions}
    value = sum(weights[user] * opinion for user, opinion in opinions.items()) / sum(weights.values())
    return Reward(value, opinions, tuple(sorted(row.id for row in counted)))


def advantages(rewards: np.ndarray, kinds: np.ndarray, prior: float) -> np.ndarray:
    """Rewards (n,) less what prompts of their kind (n,) usually earn: so an easy prompt's 👍 is no credit.

    A kind's mean is drawn to the overall one, and that to zero, as if `prior` more rewards of that size had been seen.
    """
    usual = rewards.sum() / (len(rewards) + prior) if len(rewards) else 0.0
    found = np.empty(len(rewards))
    for kind in np.unique(kinds):
        same = kinds == kind
        found[same] = rewards[same] - (rewards[same].sum() + prior * usual) / (same.sum() + prior)
    return found
