"""Learns what each signal of retrieval counts, from dialogues with questions.

A listwise softmax over the turns of each conversation (Cao and others, 2007, "Learning to Rank: From Pairwise Approach to
Listwise Approach"), drawn towards weights that did well on real conversations elsewhere, so that made dialogues move
them, and do not own them. It knows no database and no tracker.

Run: ``kibitz fit-retrieval``.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from bot.embeddings import Embedder
from bot.retrieval import Entry, ScopeIndex
from learning.dialogues import Dialogue

Progress = Callable[[str, int, int], None]

PRIOR = {
    **{"dense": 0.5, "pooled": 0.9, "bm25": 0.4, "bm25_window": 0.6, "bm25_next": 0.1},
    **{"speaker": 1.0, "asks": -0.4, "length": 0.2, "time": 0.3, "number": 0.1},
}
HOLD = 2.0  # how strongly the prior holds; in nats for a squared difference of one
NEVER_NEGATIVE = ("dense", "pooled", "bm25", "bm25_window", "bm25_next", "speaker")  # a match is never a reason against


def fit(dialogues: Iterable[Dialogue], embedder: Embedder, progress: Progress, hold: float = HOLD) -> dict[str, float]:
    """The weights of the signals that make the evidence most likely."""
    from scipy.optimize import minimize

    names = sorted(PRIOR)
    prior = np.array([PRIOR[name] for name in names])
    rows = list(examples(dialogues, embedder, progress))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient = 0.0, np.zeros_like(weights)
        for signals, evidence in rows:
            scores = signals @ weights
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            total -= float(np.log(chances[evidence] + 1e-12).mean())
            gradient += chances @ signals - signals[evidence].mean(axis=0)
        away = weights - prior
        return total / len(rows) + hold * float(away @ away), gradient / len(rows) + 2 * hold * away

    bounds = [(0.05, None) if name in NEVER_NEGATIVE else (None, None) for name in names]
    found = minimize(loss, prior, jac=True, method="L-BFGS-B", bounds=bounds)
    return {name: round(float(weight), 3) for name, weight in zip(names, found.x, strict=True)}


def examples(
    dialogues: Iterable[Dialogue], embedder: Embedder, progress: Progress
) -> Iterable[tuple[np.ndarray, list[int]]]:
    """For each question the signals of all turns (n × signals, in the order of their names), and which turns answer it."""
    everything = list(dialogues)
    for number, made in enumerate(everything):
        index = indexed(made, embedder)
        for question in made.questions:
            vector = embedder.encode([index.addressed(question["text"])[1]])[0]
            signals: Mapping[str, np.ndarray] = index.signals(question["text"], vector)
            columns = np.stack([signals[name] for name in sorted(PRIOR)], axis=1)
            yield columns, [index.rows[one] for one in question["evidence"]]
        progress("dialogues", number + 1, len(everything))


def indexed(made: Dialogue, embedder: Embedder) -> ScopeIndex:
    """A dialogue as retrieval keeps it."""
    index = ScopeIndex()
    vectors = embedder.encode([turn["text"] for turn in made.conversation])
    turns = zip(made.conversation, vectors, strict=True)
    index.add(Entry(turn["id"], "made", turn["speaker"], turn["text"], vector) for turn, vector in turns)
    return index
