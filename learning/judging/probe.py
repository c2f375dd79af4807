"""The probe of a version: token prefixes after which the server must give the same log-probabilities as the trainer.

Its prompts are no person's words, so it stays with the version when a person is forgotten. The reference is computed in
float32. The tolerance is measured: it is how far the trainer's own model moves in the number format that is served.
`learning.rollout.deployment` compares a server with it.
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
LONGEST = 512  # maximum tokens of prompt and answer
PROBED = 16  # first tokens of an answer that are probed, in steps of four
TOP = 8  # likeliest next tokens that are compared
LOGPROB_FIELDS = ("candidate", "rounded", "parent")
TOLERATED_ROUNDINGS = 2.0  # a server rounds at other places than the trainer does
MIN_ROUNDINGS_FROM_PARENT = 3.0  # so that a server one rounding away is at most half as far from the candidate as the parent


@dataclass(frozen=True)
class ProbePlace:
    """Token ids of a prefix, the candidate's likeliest next tokens, and their log-probabilities (nats).

    `candidate` and `parent` are computed in float32, `rounded` is the candidate in the served number format. `temperature`
    is the one that the version was trained for; the operator may change it later.
    """

    prompt_ids: list[int]
    tokens: list[int]
    candidate: list[float]
    rounded: list[float]
    parent: list[float]
    temperature: float = 1.0


def sample_prefixes(model: "Model", tokenizer: ChatTokenizer, max_tokens: int, seed: int) -> list[list[int]]:
    """Return token ids that end inside a model's own answers to `PROMPTS`."""
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
    """A model's log-probabilities (nats) of the whole vocabulary at each place.

    `exact` is computed in float32 and is the reference; `served` is computed in the served number format.
    """

    exact: Sequence["torch.Tensor"]
    served: Sequence["torch.Tensor"]


def measure(model: "Model", places: Sequence[Sequence[int]]) -> ProbeLogprobs:
    """Return a model's log-probabilities at some places, in float32 and in its own number format."""
    served = next_logprobs(model, places)
    with as_float32(model):
        return ProbeLogprobs(next_logprobs(model, places), served)


def write(
    directory: Path, places: Sequence[Sequence[int]], candidate: ProbeLogprobs, parent: ProbeLogprobs, temperature: float
) -> list[ProbePlace]:
    """Write the probe of a candidate into its `directory`, and return its places."""
    rows = []
    for place, own, rounded, other in zip(places, candidate.exact, candidate.served, parent.exact, strict=True):
        tokens = own.topk(TOP).indices
        exact, served, of_parent = (one[tokens].tolist() for one in (own, rounded, other))
        rows.append(ProbePlace([*place], tokens.tolist(), exact, served, of_parent, temperature))
    (directory / FILE).write_text(json.dumps([asdict(row) for row in rows]))
    return rows


def read(directory: Path) -> list[ProbePlace]:
    """Return the places of a version's probe. Raises OSError, ValueError, KeyError or TypeError if it cannot be read."""
    rows = json.loads((directory / FILE).read_text())
    return [ProbePlace(**{"rounded": row["candidate"], **row}) for row in rows]  # older probes have float32 only


@dataclass(frozen=True)
class Distances:
    """Mean distances (nats) of log-probabilities at a probe's places, as the trainer computes them.

    `rounding` is how far the number format alone moves the candidate; `change` is how far the candidate is from its parent.
    """

    rounding: float
    change: float

    @property
    def is_no_change(self) -> bool:
        """Whether rounding hides the change, so that no test can show that a server serves the candidate."""
        return self.change < MIN_ROUNDINGS_FROM_PARENT * self.rounding

    def tolerance(self, least: float) -> float:
        """Return the largest distance (nats) of a sound server from the reference, at least `least`."""
        return max(least, TOLERATED_ROUNDINGS * self.rounding)


def compute_distances(places: Sequence[ProbePlace]) -> Distances:
    """Return the distances of a candidate from its parent, and from itself in the served number format."""
    candidate, rounded, parent = ([one for place in places for one in getattr(place, name)] for name in LOGPROB_FIELDS)
    return Distances(mean_distance(candidate, rounded), mean_distance(candidate, parent))


def mean_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean absolute difference of two equally long lists of log-probabilities (nats)."""
    return float(np.abs(np.array(one) - np.array(other)).mean())
