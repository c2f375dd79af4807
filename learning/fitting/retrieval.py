"""Fit the weights of the retrieval signals, on dialogues with questions or on answers that people judged.

The model is a listwise softmax over the messages of each conversation (Cao et al., 2007, "Learning to Rank: From Pairwise
Approach to Listwise Approach"). A prior holds the weights near ones that did well on real conversations elsewhere, so that
generated dialogues only adjust them. Judged answers adjust the weights in use in the same way.

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
from bot.wording import count_noun
from learning.fitting.dialogues import Dialogue

PRIOR = {
    **{"dense": 0.5, "pooled": 0.9, "bm25": 0.4, "bm25_window": 0.6, "bm25_next": 0.1},
    **{"speaker": 1.0, "asks": -0.4, "length": 0.2, "time": 0.3, "number": 0.1},
}
HOLD = 2.0  # strength of the prior: nats for a squared difference of one
FEWEST_ANSWERS = 20  # judged answers that fitting requires, at least
ENOUGH_ANSWERS = 100  # judged answers for which the prior has strength HOLD; with fewer it is proportionally stronger
NEVER_NEGATIVE = ("dense", "pooled", "bm25", "bm25_window", "bm25_next", "speaker")  # a match must not lower the score


@dataclass(frozen=True)
class Example:
    """A question: the signals of all messages (n × signals, in the order of their names), the indices of the relevant ones,
    and the reward of showing them, in [-1, 1].
    """

    signals: np.ndarray
    evidence: list[int]
    reward: float = 1.0


def fit(examples: Sequence[Example], prior: Mapping[str, float] = PRIOR, hold: float = HOLD) -> dict[str, float]:
    """Return the weights that make liked evidence most likely, and disliked evidence unlikely."""
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
    """Return the mean loss (nats) of weights (signals,) and its gradient.

    The loss is -log p, averaged over the evidence, for a positive reward, and -log (1 - p of all evidence) for a negative
    one, times the absolute reward.
    """
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
    """Return the weights `prior`, adjusted by judged answers; the more answers, the larger the adjustment."""
    return fit(judged, prior, HOLD * ENOUGH_ANSWERS / len(judged))


def fit_and_validate(
    judged: Sequence[tuple[str, Example]], prior: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Adjust the weights in use by judged answers, given as (conversation id, example), and return them with figures.

    Raises DataError if there are too few answers, or if weights adjusted on one half of the conversations are no better on
    the other half (cross-validation).
    """
    places = sorted({place for place, _ in judged})
    if len(places) < 2 or len(judged) < FEWEST_ANSWERS:
        raise DataError(
            f"too few judged answers remembered something: {len(judged)} in "
            f"{count_noun(len(places), 'conversation')}, required {FEWEST_ANSWERS} in 2; collect more reactions first"
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
            f"weights fitted to {count_noun(len(judged), 'judged answer')} are no better on held-out ones (nats: "
            f"{figures['held_out_nats_after']:.4f}, before {figures['held_out_nats_before']:.4f}); the weights are kept"
        )
    return move_weights(everything, prior), figures


def _to_array(weights: Mapping[str, float]) -> np.ndarray:
    """Return weights as an array, in the order of the signals' names."""
    return np.array([weights[name] for name in sorted(PRIOR)])


def make_examples(dialogues: Iterable[Dialogue], embedder: Embedder, progress: Progress) -> Iterator[Example]:
    """Yield the questions of dialogues as examples."""
    everything = list(dialogues)
    for number, made in enumerate(everything):
        index = index_dialogue(made, embedder)
        for question in made.questions:
            evidence = [index.rows[one] for one in question["evidence"]]
            yield Example(compute_signals(index, question["text"], embedder), evidence)
        progress("dialogues", number + 1, len(everything))


def compute_signals(index: ScopeIndex, question: str, embedder: Embedder, asker: str = "") -> np.ndarray:
    """Compute the signals of all messages for a question (n × signals, in the order of their names)."""
    vector = embedder.encode([index.extract_speakers(question, asker)[1]])[0]
    found = index.compute_signals(question, vector, asker)
    return np.stack([found[name] for name in sorted(PRIOR)], axis=1)


def index_dialogue(made: Dialogue, embedder: Embedder) -> ScopeIndex:
    """Index a dialogue for retrieval."""
    index = ScopeIndex()
    vectors = embedder.encode([turn["text"] for turn in made.conversation])
    turns = zip(made.conversation, vectors, strict=True)
    index.add(Entry(turn["id"], "made", turn["speaker"], turn["text"], vector) for turn, vector in turns)
    return index
