"""Comparison: answers beside what is usual, and beside other answers to the same question.

It knows no database and no objective.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bot.config import Config
from bot.memory.embedder import Embedder
from learning.data.features import extract_features, predict_rewards
from learning.data.selection import assign_advantages, cluster_questions

if TYPE_CHECKING:
    from learning.data.experience import Experience


def with_advantages(
    found: Sequence["Experience"], embedder: Embedder | None, config: Config, seed: int
) -> list["Experience"]:
    """The experiences with their advantages and weights: with an embedder, beside what is usual for their kind of prompt.

    A share `rewards.smoothing` of each advantage is what answers like it earned: one reaction says little about one answer,
    and all of them say much about what is common to many. Answers that were compared with another one to the same question,
    a correction or a pick, keep what was said of them.
    """
    kind_of = cluster_questions([one.question for one in found], embedder, seed)
    share = config.rewards.smoothing
    refused = {(one.prompt_ids, one.rejected_ids) for one in found}
    is_compared = [one.rejected_ids is not None or (one.prompt_ids, one.completion_ids) in refused for one in found]

    def smooth(worth: np.ndarray, weights: np.ndarray) -> np.ndarray:
        alike = predict_rewards(worth, extract_features([one.answer for one in found], embedder), weights)
        return np.where(is_compared, worth, (1 - share) * worth + share * alike)

    return assign_advantages(
        found,
        kind_of,
        config.rewards.prior,
        config.rewards.person_cap,
        smooth if share and found else None,
    )


def pair_best_with_worst(answers: Sequence[tuple[float, "Experience"]]) -> list["Experience"]:
    """Answers to one question (with their ranks): the best with the worst as the one that it is preferred to."""
    ones = [one for _, one in answers]
    if len(ones) < 2 or any(one.rejected_ids is not None for one in ones):
        return ones
    order = sorted(range(len(ones)), key=lambda row: (ones[row].reward, answers[row][0]))
    worst, best = order[0], order[-1]
    is_better = (ones[worst].reward, answers[worst][0]) < (ones[best].reward, answers[best][0])
    is_other = ones[best].completion_ids != ones[worst].completion_ids
    if is_better and is_other and ones[worst].prompt_ids == ones[best].prompt_ids:
        said = {one for row in (best, worst) for one in (*ones[row].feedback_ids, *ones[row].rank_ids)}
        both = tuple(sorted(said))  # the other may be left out of the run, but taught it all the same
        ones[best] = replace(ones[best], rejected_ids=ones[worst].completion_ids, feedback_ids=both)
    return ones
