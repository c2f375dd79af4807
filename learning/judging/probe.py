"""The probe of a version: places at which the server must hold the same tokens likely as the trainer does.

It is made of answers to prompts that are nobody's words: it stays with the version, whoever is forgotten. The reference is
computed in float32. How far a sound server may be from it is not guessed but measured, on the trainer's own model in the
number format that is served. It knows no server: `learning.rollout.deployment` asks the questions.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bot.models.tokenizer import ChatTokenizer
from learning.judging.evaluation import generate, next_logprobs
from learning.models.trainable import as_float32

if TYPE_CHECKING:
    import torch

    from learning.models.trainable import Model

PROMPTS = ("hello", "good night", "what should i eat?", "tell me something about yourself")
FILE = "probe.json"
LONGEST = 512  # tokens of prompt and answer
PROBED = 16  # tokens of an answer, in steps of four
TOP = 8  # likeliest next tokens
LOGPROB_FIELDS = ("candidate", "rounded", "parent")
TOLERATED_ROUNDINGS = 2.0  # a server rounds elsewhere than the trainer does, but no more than that
MIN_ROUNDINGS_FROM_PARENT = (
    3.0  # roundings that a candidate must be from its parent: a server that is one away is then at most half as far
)


@dataclass(frozen=True)
class ProbePlace:
    """Token ids, the candidate's likeliest next tokens, and their log-probabilities (nats): the candidate's in float32, the
    candidate's in the number format that is served, and its parent's in float32. All at the temperature that the version was
    trained for, which the operator may change later.
    """

    prompt_ids: list[int]
    tokens: list[int]
    candidate: list[float]
    rounded: list[float]
    parent: list[float]
    temperature: float = 1.0


def sample_prefixes(model: "Model", tokenizer: ChatTokenizer, max_tokens: int, seed: int) -> list[list[int]]:
    """Token ids up to places inside a model's answers."""
    prompts = [tokenizer.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    samples = generate(model, tokenizer, prompts, max_tokens, seed)
    return [
        [*sample.prompt_ids, *sample.completion_ids[:cut]]
        for sample in samples
        if len(sample.prompt_ids) + len(sample.completion_ids) <= LONGEST
        for cut in range(0, min(len(sample.completion_ids), PROBED), 4)
    ]


@dataclass(frozen=True)
class ProbeLogprobs:
    """What a model holds likely at each place (the log-probabilities of the vocabulary, nats): computed in float32, which is
    the reference, and in the number format that it is served in.
    """

    exact: Sequence["torch.Tensor"]
    served: Sequence["torch.Tensor"]


def measure(model: "Model", places: Sequence[Sequence[int]]) -> ProbeLogprobs:
    """Return what a model holds likely at some places, in float32 and in its own number format."""
    served = next_logprobs(model, places)
    with as_float32(model):
        return ProbeLogprobs(next_logprobs(model, places), served)


def write(
    directory: Path, places: Sequence[Sequence[int]], candidate: ProbeLogprobs, parent: ProbeLogprobs, temperature: float
) -> list[ProbePlace]:
    """Save, and return, what a candidate and its parent hold of the candidate's likeliest next tokens at each place."""
    rows = []
    for place, own, rounded, other in zip(places, candidate.exact, candidate.served, parent.exact, strict=True):
        tokens = own.topk(TOP).indices
        exact, served, of_parent = (one[tokens].tolist() for one in (own, rounded, other))
        rows.append(ProbePlace([*place], tokens.tolist(), exact, served, of_parent, temperature))
    (directory / FILE).write_text(json.dumps([asdict(row) for row in rows]))
    return rows


def read(directory: Path) -> list[ProbePlace]:
    """Return the places of a version's probe. Raises OSError, ValueError, KeyError or TypeError where it cannot be read."""
    rows = json.loads((directory / FILE).read_text())
    return [ProbePlace(**{"rounded": row["candidate"], **row}) for row in rows]  # older ones were of float32 alone


@dataclass(frozen=True)
class Distances:
    """Mean distances (nats) of log-probabilities at a probe's places.

    `rounding` is how far the number format alone moves the candidate's, `change` how far the candidate is from its parent,
    both as the trainer computes them.
    """

    rounding: float
    change: float

    @property
    def is_no_change(self) -> bool:
        """Whether rounding hides what was learned, so that a server cannot be shown to serve the candidate."""
        return self.change < MIN_ROUNDINGS_FROM_PARENT * self.rounding

    def tolerance(self, least: float) -> float:
        """Return how far a sound server may be from the reference."""
        return max(least, TOLERATED_ROUNDINGS * self.rounding)


def compute_distances(places: Sequence[ProbePlace]) -> Distances:
    """Return what the trainer's own numbers say of how far a candidate is from its parent, and from itself as served."""
    candidate, rounded, parent = ([one for place in places for one in getattr(place, name)] for name in LOGPROB_FIELDS)
    return Distances(mean_distance(candidate, rounded), mean_distance(candidate, parent))


def mean_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean absolute difference of two equally long lists of log-probabilities (nats)."""
    return float(np.abs(np.array(one) - np.array(other)).mean())
