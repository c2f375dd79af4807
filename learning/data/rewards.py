"""Rewards: reduce the feedback on a turn to one number in [-1, 1]. Pure functions of the record (law 2).

Silence is not disapproval: a turn without effective feedback has no reward, which differs from a reward of zero.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bot.config import RewardsConfig
from bot.store.feedback import select_effective
from bot.types import Feedback, FeedbackKind, FollowUp

FEEDBACK_OF_FOLLOW_UP = {  # the feedback that a follow-up is equivalent to
    "approval": FeedbackKind.APPROVAL,
    "disapproval": FeedbackKind.DISAPPROVAL,
    "correction": FeedbackKind.CORRECTION,
    "repetition": FeedbackKind.REGENERATE,
}


@dataclass(frozen=True)
class Reward:
    """The reward of a turn, with each person's opinion and the feedback behind it."""

    value: float
    opinions: dict[str, float]
    feedback_ids: tuple[str, ...]
    followup_id: str | None = None


def compute_reward(
    feedback: Iterable[Feedback], asker_id: str, config: RewardsConfig, followup: FollowUp | None = None
) -> Reward | None:
    """Return the weighted mean of people's opinions, or None if no feedback is effective.

    Each person's acts are added and clipped to [-1, 1], so that nobody counts more than once. The asker weighs more than a
    bystander. The order of `feedback` does not matter. If `rewards.followup` is set, a follow-up counts as the feedback
    that it most likely means, times the probability of that.
    """
    worth = {
        FeedbackKind.APPROVAL: config.approval,
        FeedbackKind.DISAPPROVAL: config.disapproval,
        FeedbackKind.REGENERATE: config.regenerate,
        FeedbackKind.CORRECTION: config.correction,
    }
    counted = [row for row in select_effective(feedback) if row.kind in worth or row.kind == FeedbackKind.RATING]
    sums: dict[str, float] = defaultdict(float)
    for row in counted:
        sums[row.user_id] += worth.get(row.kind, row.value or 0.0)
    used = followup if followup and config.followup and followup.kind in FEEDBACK_OF_FOLLOW_UP else None
    if used is not None:
        sums[asker_id] += config.followup * used.chances[used.kind] * worth[FEEDBACK_OF_FOLLOW_UP[used.kind]]
    if not sums:
        return None
    opinions = {user: max(-1.0, min(1.0, total)) for user, total in sorted(sums.items())}
    weights = {user: config.asker_weight if user == asker_id else config.bystander_weight for user in opinions}
    value = sum(weights[user] * opinion for user, opinion in opinions.items()) / sum(weights.values())
    return Reward(value, opinions, tuple(sorted(row.id for row in counted)), None if used is None else used.message_id)


def advantages(rewards: np.ndarray, kinds: np.ndarray, prior: float) -> np.ndarray:
    """Return rewards (n,) minus the usual reward of their kind of prompt (n,), so that a 👍 on an easy prompt counts little.

    The mean of a kind is shrunk to the overall mean, and that to zero, as if there were `prior` more rewards of that size.
    """
    usual = rewards.sum() / (len(rewards) + prior) if len(rewards) else 0.0
    found = np.empty(len(rewards))
    for kind in np.unique(kinds):
        same = kinds == kind
        found[same] = rewards[same] - (rewards[same].sum() + prior * usual) / (same.sum() + prior)
    return found
