"""Off-policy estimate: what a policy would earn, from answers that people judged and that another policy gave.

The doubly robust estimate (Dudík, Langford and Li, 2011, "Doubly Robust Policy Evaluation and Learning", arXiv:1103.4601):
what a reward model makes of the policy's own answers, put right by where it errs on the judged ones, each as much as the
policy makes it likelier. It is right where either the reward model or the weights are. It knows no weights of a policy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from learning.data.experience import Experience
from learning.judging.evaluation import Sample
from learning.judging.reward_model import AnyRewardModel
from learning.judging.reward_scores import figures
from learning.judging.statistics import calibration, mean_interval

if TYPE_CHECKING:
    import torch

CUT = 2.0  # of importance weights: without it one answer that became much likelier would be the whole estimate
Said = Mapping[tuple[int, ...], Sample]  # a policy's own answer to each prompt


def doubly_robust(expected: np.ndarray, weights: np.ndarray, rewards: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """What each judged answer says of the policy's worth (n,); its mean is the estimate.

    `expected` is what the model makes of the policy's own answer to the same prompt, `predicted` what it makes of the
    judged one, which earned `rewards`; where the log-probability was not recorded, `weights` is 0: the model has the word.
    """
    return expected + weights * (rewards - predicted)


def importance(now: Sequence["torch.Tensor"], judged: Sequence[Experience]) -> np.ndarray:
    """How much likelier each judged answer (n,) is now than it was when it was given; 0 where that is not known."""
    return np.array(
        [
            0.0 if one.logprobs is None else min(CUT, float(np.exp(float(row.sum()) - sum(one.logprobs))))
            for row, one in zip(now, judged, strict=True)
        ]
    )


def estimated(
    training: Sequence[Experience],
    held_out: Sequence[Experience],
    model: AnyRewardModel,
    policies: Mapping[str, tuple[Said, Sequence["torch.Tensor"]]],
    seed: int,
) -> dict[str, Any]:
    """The worth (in [-1, 1]) of the policies `before` and `after` with the gain and its 95% interval, and the reward model's
    own quality; nothing where too little is rated to fit one.

    Of each policy its answers to held-out prompts are given, and the log-probabilities of the held-out answers.
    """
    quality = model.fit(training)
    rows = [row for row, one in enumerate(held_out) if all(one.prompt_ids in said for said, _ in policies.values())]
    if quality is None or not rows:
        return {}
    judged = [held_out[row] for row in rows]
    rewards = np.array([one.reward for one in judged])
    predicted = 2 * model.chances(judged) - 1
    worth = {}
    for name, (said, logprobs) in policies.items():
        answers = [said[one.prompt_ids] for one in judged]
        own = [
            replace(one, answer=sample.text, completion_ids=sample.completion_ids)
            for one, sample in zip(judged, answers, strict=True)
        ]
        weights = importance([logprobs[row] for row in rows], judged)
        worth[name] = doubly_robust(2 * model.chances(own) - 1, weights, rewards, predicted)
    units = np.array([one.unit for one in judged])
    gains = worth["after"] - worth["before"]
    gain, low, high = mean_interval([float(gains[units == unit].mean()) for unit in np.unique(units)], seed)
    return {
        "estimated_worth_before": float(worth["before"].mean()),
        "estimated_worth_after": float(worth["after"].mean()),
        "estimated_gain": [gain, low, high],
        "reward_model": figures(quality, seed) | {"calibration": calibration(quality.chances, quality.liked)},
    }
