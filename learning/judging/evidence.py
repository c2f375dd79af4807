"""Evidence: measure the candidate and the live version, on the answers that people judged and on answers of their own.

Both are measured alike, by a training run and again when a candidate has waited. `learning.judging.gate` selects the
opinions and draws the conclusions. It does not depend on a database or a server.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from bot.config import PolicyConfig, RewardsConfig
from bot.memory.embedder import Embedder
from bot.models.tokenizer import ChatTokenizer
from learning.data.experience import Experience
from learning.data.selection import cluster_questions
from learning.judging.evaluation import Sample, batched_logprobs, generate, means, token_rows
from learning.judging.gate import Evidence, Soundness, collect_opinions, compute_gain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measurement:
    """A model's log-probabilities (nats) of the tokens of each judged answer, and its own answers to some prompts."""

    logprobs: "list[torch.Tensor]"
    samples: list[Sample]


def choose_prompts(rows: Sequence[Experience], count: int) -> list[Experience]:
    """Return `count` rows with different prompts, in order; prompts are repeated if there are fewer."""
    different = {row.prompt_ids: row for row in rows}
    return list(itertools.islice(itertools.cycle(different.values()), count))


def sample_answers(
    policy: PolicyConfig, seed: int, model: Any, tokenizer: ChatTokenizer, asked: Sequence[Experience]
) -> list[Sample]:
    """Return one answer of a model to each prompt, with the policy's sampling settings."""
    prompts = [one.prompt_ids for one in asked]
    return generate(model, tokenizer, prompts, policy.max_tokens, seed, policy.truncation)


def measure_model(
    policy: PolicyConfig,
    seed: int,
    model: Any,
    tokenizer: ChatTokenizer,
    judged: Sequence[Experience],
    asked: Sequence[Experience],
) -> Measurement:
    """Measure a model on the `judged` answers and on the prompts of `asked`."""
    logprobs = batched_logprobs(model, token_rows(judged))
    return Measurement(logprobs, sample_answers(policy, seed, model, tokenizer, asked))


def with_mean_logprobs(model: Any, answers: Sequence[Experience], longest: int) -> list[Experience]:
    """Return the answers with the mean log-probability (nats per token) under a model, unless one was recorded.

    It stays None for answers that have more than `longest` tokens with their prompt.
    """
    missing = [row for row, one in enumerate(answers) if one.mean_logprob is None and one.length <= longest]
    missing.sort(key=lambda row: answers[row].length)  # so that little of a batch is padding
    measured = means(batched_logprobs(model, token_rows([answers[row] for row in missing])))
    found = [*answers]
    for row, value in zip(missing, measured, strict=True):
        found[row] = replace(answers[row], mean_logprob=value)
    return found


def compare_with_live(
    rewards: RewardsConfig,
    seed: int,
    judged: Sequence[Experience],
    others: Sequence[Experience],
    live: Measurement,
    candidate: Measurement,
    embedder: Embedder | None,
    soundness: Soundness,
    faults: Sequence[str] = (),
) -> Evidence:
    """Compare a candidate with the live version on the `judged` answers.

    The questions of the `others` help to cluster questions by kind. `soundness` and `faults` are copied into the result.
    """
    kinds = cluster_questions([row.question for row in (*judged, *others)], embedder, seed)[: len(judged)]
    opinions = collect_opinions(judged, kinds.tolist(), rewards.person_cap)
    gain = compute_gain([row.answer for row in judged], opinions, live.samples, candidate.samples, embedder)
    return Evidence(opinions, means(live.logprobs), means(candidate.logprobs), gain, [*faults], **asdict(soundness))
