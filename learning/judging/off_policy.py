"""Off-policy estimate: the reward that a policy would earn, from judged answers of another policy.

The doubly robust estimate (Dudík, Langford and Li, 2011, "Doubly Robust Policy Evaluation and Learning", arXiv:1103.4601) is
a reward model's score of the policy's own answers, corrected by the model's errors on the judged answers. Importance weights
say how much each error counts. The estimate is right if either the reward model or the weights are right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bot.records import Record
from learning.data.experience import Experience
from learning.judging.evaluation import Sample
from learning.judging.reward_model import AnyRewardModel
from learning.judging.reward_scores import Scores, score
from learning.judging.statistics import Bin, Interval, calibration, mean_interval

if TYPE_CHECKING:
    import torch

MAX_IMPORTANCE = 2.0  # cap of importance weights, or one answer that became much likelier would dominate the estimate


@dataclass(frozen=True)
class Answers:
    """A policy's own answer to each held-out prompt, and its log-probabilities (nats) of the held-out answers."""

    own: Mapping[tuple[int, ...], Sample]
    logprobs: Sequence["torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Quality(Scores):
    """The scores of a reward model, and the calibration of its probabilities."""

    calibration: list[Bin]


class Estimate(Record):
    """The estimated worth (in [-1, 1]) of an answer before and after a run, and the gain with its 95% interval.

    All fields are None if too few answers are rated to fit a reward model.
    """

    estimated_worth_before: float | None = None
    estimated_worth_after: float | None = None
    estimated_gain: Interval | None = None
    reward_model: Quality | None = None


def doubly_robust(expected: np.ndarray, weights: np.ndarray, rewards: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the terms (n,) of the doubly robust estimate of a policy's worth; the estimate is their mean.

    `expected` is the model's prediction for the policy's own answer to each prompt, `predicted` the one for the judged
    answer, which earned `rewards`. `weights` is 0 for an answer without recorded log-probabilities; its term is `expected`.
    """
    return expected + weights * (rewards - predicted)


def importance_weights(now: Sequence["torch.Tensor"], judged: Sequence[Experience]) -> np.ndarray:
    """Return how many times likelier each judged answer (n,) is than when it was sampled; 0 if that is not known."""
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
    """Estimate a policy's worth `before` and `after`. The estimate is empty if too few answers are rated."""
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
            replace(
                one,
                answer=sample.text,
                completion_ids=sample.completion_ids,
                is_finished=sample.is_finished,
                mean_logprob=None,
            )
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
