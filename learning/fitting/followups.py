"""Fit the classifier of follow-ups, on the phrases in `followups.json` after generated questions and answers.

Phrases, not examples, are held out: a third for calibration (one temperature; Guo et al., 2017, "On Calibration of Modern
Neural Networks") and a third for judging.

Run: ``kibitz fit-followups``.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from bot.memory.embedder import Embedder
from bot.memory.followups import KINDS, compute_features
from bot.types import Progress
from learning.judging.statistics import calibration_error

TEXTS = json.loads(Path(__file__).with_name("followups.json").read_text(encoding="utf-8"))
PHRASES = {kind: TEXTS["again" if kind == "repetition" else kind] for kind in KINDS}
EACH = 8  # examples per phrase
PARTS = ("learn", "calibrate", "judge")


def make_examples(part: str, seed: int, embedder: Embedder, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Make examples from the phrases of one of PARTS: features (n × f) and kinds (n, indices of KINDS)."""
    rng = random.Random(f"{seed} {part}")
    triples, kinds = [], []
    for number, kind in enumerate(KINDS):
        phrases = random.Random(f"{seed} {kind}").sample(PHRASES[kind], len(PHRASES[kind]))
        for phrase in phrases[PARTS.index(part) :: len(PARTS)]:
            for _ in range(EACH):
                things = rng.sample(TEXTS["things"], 3)
                question = rng.choice(TEXTS["questions"]).format(thing=things[0])
                answer = rng.choice(TEXTS["answers"]).format(thing=things[1])
                text = phrase.format(thing=things[2], question=question)
                triples.append((rng.choice([text, text.capitalize(), text.rstrip(".!")]), question, answer))
                kinds.append(number)
    rows = []
    for number, triple in enumerate(triples):
        rows.append(compute_features(*triple, embedder.encode(triple)))
        progress(f"phrases to {part}", number + 1, len(triples))
    return np.array(rows), np.array(kinds)


def fit(seed: int, embedder: Embedder, progress: Progress) -> tuple[dict[str, Any], dict[str, float]]:
    """Fit the weights, divided by the temperature, and return them with their figures on held-out phrases."""
    from scipy.optimize import minimize_scalar
    from sklearn.linear_model import LogisticRegression

    inputs, kinds = make_examples("learn", seed, embedder, progress)
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000).fit(inputs, kinds)
    known, right = make_examples("calibrate", seed, embedder, progress)
    scores = model.decision_function(known)
    best = minimize_scalar(lambda one: _loss(scores / one, right), bounds=(0.1, 10), method="bounded")
    weights, bias = model.coef_ / best.x, model.intercept_ / best.x
    unseen, truth = make_examples("judge", seed, embedder, progress)
    chances = softmax(unseen @ weights.T + bias, axis=1)
    found = chances.argmax(axis=1)
    figures = {f"recall_{kind}": float((found[truth == n] == n).mean()) for n, kind in enumerate(KINDS)}
    figures |= {
        "accuracy": float((found == truth).mean()),
        "calibration_error": calibration_error(chances.max(axis=1), found == truth),
    }
    return {"weights": weights.round(3).tolist(), "bias": bias.round(3).tolist()}, figures | {"examples": float(len(truth))}


def _loss(scores: np.ndarray, kinds: np.ndarray) -> float:
    return float(-np.log(softmax(scores, axis=1)[np.arange(len(kinds)), kinds] + 1e-12).mean())
