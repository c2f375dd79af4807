"""Learns what each signal of retrieval counts, from dialogues with questions or from answers that people judged.

A listwise softmax over the turns of each conversation (Cao and others, 2007, "Learning to Rank: From Pairwise Approach to
Listwise Approach"), drawn towards weights that did well on real conversations elsewhere, so that made dialogues move
them, and do not own them; the same for what people liked, which moves the weights that were in use. It knows no database
and no tracker.

Run: ``kibitz fit-retrieval``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bot.errors import DataError
from bot.memory.embedder import Embedder
from bot.memory.index import Entry, ScopeIndex
from bot.types import Progress
from learning.fitting.dialogues import Dialogue

PRIOR = {
    **{"dense": 0.5, "pooled": 0.9, "bm25": 0.4, "bm25_window": 0.6, "bm25_next": 0.1},
    **{"speaker": 1.0, "asks": -0.4, "length": 0.2, "time": 0.3, "number": 0.1},
}
HOLD = 2.0  # how strongly the prior holds; in nats for a squared difference of one
FEWEST_ANSWERS = 20  # judged answers that are worth fitting to
ENOUGH_ANSWERS = 100  # judged answers against which what they move holds as strongly; against fewer it holds more
NEVER_NEGATIVE = ("dense", "pooled", "bm25", "bm25_window", "bm25_next", "speaker")  # a match is never a reason against


@dataclass(frozen=True)
class Example:
    """A question: the signals of all turns (n × signals, in the order of their names), which turns bear on it, and what that
    earned, in [-1, 1]."""

    signals: np.ndarray
    evidence: list[int]
    reward: float = 1.0


def fit(examples: Sequence[Example], prior: Mapping[str, float] = PRIOR, hold: float = HOLD) -> dict[str, float]:
    """The weights of the signals that make the evidence most likely, and what was disliked less so."""
    from scipy.optimize import minimize

    start = _to_array(prior)

    def held(weights: np.ndarray) -> tuple[float, np.ndarray]:
        found, gradient = loss(examples, weights)
        away = weights - start
        return found + hold * float(away @ away), gradient + 2 * hold * away

    bounds = [(0.05, None) if name in NEVER_NEGATIVE else (None, None) for name in sorted(PRIOR)]
    found = minimize(held, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return {name: round(float(weight), 3) for name, weight in zip(sorted(PRIOR), found.x, strict=True)}


def loss(examples: Sequence[Example], weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean loss in nats of weights (signals,) and its gradient: of what was liked -log p of each piece of evidence, of
    what was disliked -log (1 - p) of all of it, times what it earned."""
    total, gradient = 0.0, np.zeros_like(weights)
    for one in examples:
        scores = one.signals @ weights
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        usual = chances @ one.signals
        if one.reward > 0:
            total -= one.reward * float(np.log(chances[one.evidence] + 1e-12).mean())
            gradient += one.reward * (usual - one.signals[one.evidence].mean(axis=0))
        else:
            mass = min(float(chances[one.evidence].sum()), 1 - 1e-6)
            slope = chances[one.evidence] @ (one.signals[one.evidence] - usual)
            total += one.reward * float(np.log(1 - mass))
            gradient -= one.reward * slope / (1 - mass)
    return total / len(examples), gradient / len(examples)


def move_weights(judged: Sequence[Example], prior: Mapping[str, float]) -> dict[str, float]:
    """The weights that were in use, moved by as much as so many judged answers may."""
    return fit(judged, prior, HOLD * ENOUGH_ANSWERS / len(judged))


def fit_and_validate(
    judged: Sequence[tuple[str, Example]], prior: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """The weights in use, moved by all judged answers (each with its conversation), and the figures that allow it.

    Raises DataError where there is too little, or where weights that learned from one half of the conversations would do
    no better on the other.
    """
    places = sorted({place for place, _ in judged})
    if len(places) < 2 or len(judged) < FEWEST_ANSWERS:
        raise DataError(
            f"{len(judged)} judged answers in {len(places)} conversations were reminded of something; "
            f"it takes {FEWEST_ANSWERS}, in "
            "two at least: let people go on reacting"
        )
    everything = [one for _, one in judged]
    every_other = set(places[::2])
    halves = [[one for place, one in judged if (place in every_other) == first] for first in (True, False)]
    after = sum(
        loss(others, _to_array(move_weights(half, prior)))[0] * len(others) for half, others in (halves, halves[::-1])
    )
    figures = {
        "answers": len(judged),
        "held_out_nats_before": loss(everything, _to_array(prior))[0],
        "held_out_nats_after": after / len(judged),
    }
    if figures["held_out_nats_after"] >= figures["held_out_nats_before"]:
        raise DataError(
            f"what was learned from {len(judged)} judged answers does no better on others (nats: "
            f"{figures['held_out_nats_after']:.4f}, before {figures['held_out_nats_before']:.4f}); the weights stay"
        )
    return move_weights(everything, prior), figures


def _to_array(weights: Mapping[str, float]) -> np.ndarray:
    """Weights in the order of the signals' names."""
    return np.array([weights[name] for name in sorted(PRIOR)])


def make_examples(dialogues: Iterable[Dialogue], embedder: Embedder, progress: Progress) -> Iterator[Example]:
    """The questions of made dialogues."""
    everything = list(dialogues)
    for number, made in enumerate(everything):
        index = index_dialogue(made, embedder)
        for question in made.questions:
            evidence = [index.rows[one] for one in question["evidence"]]
            yield Example(compute_signals(index, question["text"], embedder), evidence)
        progress("dialogues", number + 1, len(everything))


def compute_signals(index: ScopeIndex, question: str, embedder: Embedder, asker: str = "") -> np.ndarray:
    """The signals of all turns for a question (n × signals, in the order of their names)."""
    vector = embedder.encode([index.extract_speakers(question, asker)[1]])[0]
    found = index.compute_signals(question, vector, asker)
    return np.stack([found[name] for name in sorted(PRIOR)], axis=1)


def index_dialogue(made: Dialogue, embedder: Embedder) -> ScopeIndex:
    """A dialogue as retrieval keeps it."""
    index = ScopeIndex()
    vectors = embedder.encode([turn["text"] for turn in made.conversation])
    turns = zip(made.conversation, vectors, strict=True)
    index.add(Entry(turn["id"], "made", turn["speaker"], turn["text"], vector) for turn, vector in turns)
    return index
