"""Off-policy estimate: what a policy would earn, from answers that people judged and that another policy gave.

The doubly robust estimate (Dudík, Langford and Li, 2011, "Doubly Robust Policy Evaluation and Learning", arXiv:1103.4601):
what a reward model makes of the policy's own answers, put right by where it errs on the judged ones, each as much as the
policy makes it likelier. It is right where either the reward model or the weights are. It knows no weights of a policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bot.types import Record
from learning.data.experience import Experience
from learning.judging.evaluation import Sample
from learning.judging.reward_model import AnyRewardModel
from learning.judging.reward_scores import Scores, score
from learning.judging.statistics import Bin, Interval, calibration, mean_interval

if TYPE_CHECKING:
    import torch

MAX_IMPORTANCE = 2.0  # of importance weights: without it one answer that became much likelier would be the whole estimate


@dataclass(frozen=True)
class Answers:
    """A policy's own answer to each held-out prompt, and the log-probabilities (nats) that it gives the held-out answers."""

    own: Mapping[tuple[int, ...], Sample]
    logprobs: Sequence["torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Quality(Scores):
    """How good the reward model is, and how its probabilities fit what people said."""

    calibration: list[Bin]


class Estimate(Record):
    """The worth (in [-1, 1]) of the policies before and after a run, the gain with its 95% interval, and the quality of the
    reward model that says so; None where too little is rated to fit one.
    """

    estimated_worth_before: float | None = None
    estimated_worth_after: float | None = None
    estimated_gain: Interval | None = None
    reward_model: Quality | None = None


def doubly_robust(expected: np.ndarray, weights: np.ndarray, rewards: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """What each judged answer says of the policy's worth (n,); its mean is the estimate.

    `predict_rewards` is what the model makes of the policy's own answer to the same prompt, `predicted` what it makes of the
    judged one, which earned `rewards`; where the log-probability was not recorded, `weights` is 0: the model has the word.
    """
    return expected + weights * (rewards - predicted)


def importance_weights(now: Sequence["torch.Tensor"], judged: Sequence[Experience]) -> np.ndarray:
    """How much likelier each judged answer (n,) is now than it was when it was given; 0 where that is not known."""
    return np.array(
        [
            0.0 if one.logprobs is None else min(MAX_IMPORTANCE, float(np.exp(float(row.sum()) - sum(one.logprobs))))
            for row, one in zip(now, judged, strict=True)
        ]
    )


def estimate_worth(
    training: Sequence[Experience],
    held_out: Sequence[Experience],
    model: AnyRewardModel,
    before: Answers,
    after: Answers,
    seed: int,
) -> Estimate:
    """Estimate the worth of a policy `before` and `after`; nothing where too little is rated to fit the reward model."""
    quality = model.fit(training)
    rows = [row for row, one in enumerate(held_out) if one.prompt_ids in before.own and one.prompt_ids in after.own]
    if quality is None or not rows:
        return Estimate()
    judged = [held_out[row] for row in rows]
    rewards = np.array([one.reward for one in judged])
    predicted = 2 * model.predict_chances(judged) - 1

    def worth(policy: Answers) -> np.ndarray:
        answers = [policy.own[one.prompt_ids] for one in judged]
        own = [
            replace(one, answer=sample.text, completion_ids=sample.completion_ids)
            for one, sample in zip(judged, answers, strict=True)
        ]
        weights = importance_weights([policy.logprobs[row] for row in rows], judged)
        return doubly_robust(2 * model.predict_chances(own) - 1, weights, rewards, predicted)

    old, new = worth(before), worth(after)
    units = np.array([one.unit for one in judged])
    gains = new - old
    scores = asdict(score(quality, seed))
    return Estimate(
        estimated_worth_before=float(old.mean()),
        estimated_worth_after=float(new.mean()),
        estimated_gain=mean_interval([float(gains[units == unit].mean()) for unit in np.unique(units)], seed),
        reward_model=Quality(**scores, calibration=calibration(quality.chances, quality.liked)),
    )
