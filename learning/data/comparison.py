"""Comparison: compare answers with the usual reward of such prompts, and with other answers to the same question.

It does not depend on a database or an objective.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bot.config import RewardsConfig
from bot.memory.embedder import Embedder
from learning.data.features import extract_features, predict_rewards
from learning.data.selection import assign_advantages, cluster_questions

if TYPE_CHECKING:
    from learning.data.experience import Experience


def with_advantages(
    found: Sequence["Experience"], embedder: Embedder | None, rewards: RewardsConfig, seed: int
) -> list["Experience"]:
    """Return the experiences with advantages and weights. With an embedder, rewards are compared within a kind of prompt.

    A share `rewards.smoothing` of each advantage is predicted from similar answers, because one reaction says little about
    one answer, but all of them say much about what many answers share. Answers that people compared with another answer to
    the same question, by a correction or a pick, are not smoothed.
    """
    kind_of = cluster_questions([one.question for one in found], embedder, seed)
    share = rewards.smoothing
    refused = {(one.prompt_ids, one.rejected_ids) for one in found}
    is_compared = [one.rejected_ids is not None or (one.prompt_ids, one.completion_ids) in refused for one in found]

    def smooth(worth: np.ndarray, weights: np.ndarray) -> np.ndarray:
        alike = predict_rewards(worth, extract_features([one.answer for one in found], embedder), weights)
        return np.where(is_compared, worth, (1 - share) * worth + share * alike)

    return assign_advantages(
        found,
        kind_of,
        rewards.prior,
        rewards.person_cap,
        smooth if share and found else None,
    )


def pair_best_with_worst(answers: Sequence[tuple[float, "Experience"]]) -> list["Experience"]:
    """Return the answers to one question, the best one with the worst as its rejected answer.

    Each answer comes with its rank. Nothing is paired if there is no clear best, or if an answer is paired already.
    """
    ones = [one for _, one in answers]
    if len(ones) < 2 or any(one.rejected_ids is not None for one in ones):
        return ones
    order = sorted(range(len(ones)), key=lambda row: (ones[row].reward, answers[row][0]))
    worst, best = order[0], order[-1]
    is_better = (ones[worst].reward, answers[worst][0]) < (ones[best].reward, answers[best][0])
    is_other = ones[best].completion_ids != ones[worst].completion_ids
    if is_better and is_other and ones[worst].prompt_ids == ones[best].prompt_ids:
        said = {one for row in (best, worst) for one in (*ones[row].feedback_ids, *ones[row].rank_ids)}
        both = tuple(sorted(said))  # the rejected answer teaches the run even if its own row is left out
        ones[best] = replace(ones[best], rejected_ids=ones[worst].completion_ids, feedback_ids=both)
    return ones
