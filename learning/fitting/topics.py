"""Fit the detector of new topics in conversations, on dialogues in which people labelled them.

The input is in the format of TIAGE: a JSON object of dialogues, each a list of [utterance, label]. The label is "1" if a new
topic begins, "0" if not, and "-1" for the first utterance.

Run: ``kibitz fit-topics TRAIN --test TEST``.
"""

import json
from pathlib import Path

import numpy as np

from bot.errors import DataError
from bot.memory.embedder import Embedder
from bot.memory.topics import compute_features
from bot.types import Progress


def read(path: Path) -> list[tuple[list[str], np.ndarray]]:
    """Read the utterances of each dialogue, and for all but the first whether they begin a topic. Raises DataError."""
    try:
        dialogues = json.loads(path.read_text(encoding="utf-8")).values()
        return [([text for text, _ in one], np.array([label == "1" for _, label in one[1:]])) for one in dialogues]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read as labelled dialogues ({error}); give TIAGE's train, dev or test file"
        ) from error


def make_examples(
    dialogues: list[tuple[list[str], np.ndarray]], embedder: Embedder, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the features of all messages (n × features), and whether each begins a topic (n)."""
    rows = []
    for number, (texts, _) in enumerate(dialogues):
        rows.append(compute_features(texts, embedder.encode(texts)))
        progress("dialogues", number + 1, len(dialogues))
    return np.concatenate(rows), np.concatenate([labels for _, labels in dialogues])


def fit(inputs: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    """Fit weights and bias, and the threshold with the best F1 on the same data."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = inputs.mean(axis=0), inputs.std(axis=0) + 1e-9
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000).fit((inputs - mean) / spread, labels)
    weights = model.coef_[0] / spread
    bias = float(model.intercept_[0] - (model.coef_[0] * mean / spread).sum())
    scores = inputs @ weights + bias
    best = max(np.quantile(scores, np.linspace(0.3, 0.95, 100)), key=lambda one: f1(scores > one, labels))
    return {"weights": weights.round(4).tolist(), "bias": round(bias, 4), "threshold": round(float(best), 4)}


def f1(found: np.ndarray, labels: np.ndarray) -> float:
    """Return the F1 score (harmonic mean of precision and recall) of the detected topic beginnings."""
    hits = float((found & labels).sum())
    return 2 * hits / max(1.0, float(found.sum() + labels.sum()))


def fit_and_judge(
    train: list[tuple[list[str], np.ndarray]],
    test: list[tuple[list[str], np.ndarray]],
    embedder: Embedder,
    progress: Progress,
) -> tuple[dict[str, object], dict[str, float]]:
    """Fit on `train`, and return the result with its figures on `test`, beside the best single cosine threshold there."""
    learned = fit(*make_examples(train, embedder, progress))
    inputs, labels = make_examples(test, embedder, progress)
    scores = inputs @ np.array(learned["weights"]) + learned["bias"]
    cosine = max(f1(inputs[:, 0] < threshold, labels) for threshold in np.linspace(0, 0.6, 31))
    figures = {"f1": f1(scores > learned["threshold"], labels), "cosine_f1": cosine, "always_f1": f1(labels | True, labels)}
    return learned, figures | {"messages": float(len(labels))}
