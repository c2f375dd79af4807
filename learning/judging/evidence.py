"""Evidence: what a candidate and the live version make of the answers that people judged, and what they answer themselves.

Both are measured alike, by a training run and again when a candidate has waited. Which opinions judge, and what follows
from them, is the question of `learning.judging.gate`. It knows no database and no server.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bot.config import Config
from bot.memory.embedder import Embedder
from bot.models.tokenizer import ChatTokenizer
from learning.data.experience import Experience
from learning.data.selection import kinds_of
from learning.judging.evaluation import Sample, batched_logprobs, generate, means, token_rows
from learning.judging.gate import Evidence, Soundness, gain_of, opinions_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Measured:
    """What a model gives the tokens of each judged answer (nats), and what it says to the prompts that it is asked."""

    logprobs: "list[torch.Tensor]"
    samples: list[Sample]


def choose_prompts(rows: Sequence[Experience], count: int) -> list[Experience]:
    """Return `count` rows whose prompts are answered anew: different ones in their order; again where there are fewer."""
    different = {row.prompt_ids: row for row in rows}
    return list(itertools.islice(itertools.cycle(different.values()), count))


def answer(config: Config, model: Any, tokenizer: ChatTokenizer, asked: Sequence[Experience]) -> list[Sample]:
    """Return one answer of a model to each prompt, sampled as the policy's are."""
    prompts = [one.prompt_ids for one in asked]
    return generate(model, tokenizer, prompts, config.policy.max_tokens, config.seed, config.policy.truncation)


def measure(
    config: Config, model: Any, tokenizer: ChatTokenizer, judged: Sequence[Experience], asked: Sequence[Experience]
) -> Measured:
    """Measure a model on the `judged` answers and the prompts that it is `asked`."""
    return Measured(batched_logprobs(model, token_rows(judged)), answer(config, model, tokenizer, asked))


def compare(
    config: Config,
    judged: Sequence[Experience],
    others: Sequence[Experience],
    live: Measured,
    candidate: Measured,
    embedder: Embedder | None,
    soundness: Soundness,
    faults: Sequence[str] = (),
) -> Evidence:
    """Return what the `judged` answers say of a candidate beside the live version, with what its run measured.

    The questions of the `others` help to tell kinds of questions apart.
    """
    kinds = kinds_of([row.question for row in (*judged, *others)], embedder, config.seed)[: len(judged)]
    opinions = opinions_of(judged, kinds.tolist(), config.rewards.person_cap)
    gain = gain_of([row.answer for row in judged], opinions, live.samples, candidate.samples, embedder)
    return Evidence(opinions, means(live.logprobs), means(candidate.logprobs), gain, [*faults], **asdict(soundness))
