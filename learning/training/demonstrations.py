"""Demonstrations: people's corrections, preferred to answers of the policy's own.

A correction tells more than that one answer was bad: the person would rather read it than anything else the policy says. So
the policy, as it is when the run begins, and the base model answer the corrected prompts, and these answers count as
disliked. The answer that was corrected counts so already; it comes from the version that was live then.

Shaikh et al. (2024), "Show, Don't Tell: Aligning Language Models with Demonstrated Feedback", arXiv:2406.00888.

It depends neither on a database nor on a server.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bot.config import Config
from bot.models.tokenizer import ChatTokenizer
from learning.data.experience import Experience
from learning.judging.evaluation import Sample, batched_logprobs, generate, token_rows
from learning.models.trainable import as_base

if TYPE_CHECKING:
    from learning.models.trainable import Model

NEWEST = 32  # corrections that are preferred so, at most, because answering takes time


def prefer_to_own_answers(
    config: Config, model: "Model", tokenizer: ChatTokenizer, rows: Sequence[Experience]
) -> list[Experience]:
    """Return further rows for the newest corrections among `rows`: answers of the model and of its base, as disliked.

    There are `learning.own_answers` of each to every correction. Together they weigh as much as the correction. For `dpo`
    they are pairs of it and one such answer. They carry the feedback of the correction.
    """
    corrections = [one for one in rows if one.is_correction and one.advantage > 0][-NEWEST:]
    asked = [one for one in corrections for _ in range(config.learning.own_answers)]
    if not asked:
        return []

    def answer(seed: int) -> list[Experience]:
        prompts, policy = [one.prompt_ids for one in asked], config.policy
        samples = generate(model, tokenizer, prompts, policy.max_tokens, seed, policy.truncation)
        logprobs = batched_logprobs(model, token_rows(samples))
        return [_dislike(*row, share) for row in zip(asked, samples, logprobs, strict=True)]

    share = 1 / (2 * config.learning.own_answers)
    disliked = answer(config.seed)
    with as_base(model):
        disliked += answer(config.seed + 1)
    told = [(one, other) for one, other in zip([*asked, *asked], disliked, strict=True) if _differ(one, other)]
    if config.training.objective == "dpo":
        return [replace(one, rejected_ids=other.completion_ids, weight=one.weight * share) for one, other in told]
    return [other for _, other in told]


def _dislike(correction: Experience, sample: Sample, logprobs: Any, share: float) -> Experience:
    """Return an answer to a corrected prompt as a disliked one, with a share of the correction's weight."""
    return replace(
        correction,
        completion_ids=sample.completion_ids,
        logprobs=tuple(logprobs.tolist()),
        rejected_ids=None,
        answer=sample.text,
        is_correction=False,
        is_finished=sample.is_finished,
        reward=-correction.reward,
        advantage=-correction.advantage * share,
    )


def _differ(one: Experience, other: Experience) -> bool:
    return one.completion_ids != other.completion_ids
