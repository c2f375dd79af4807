"""Topics: where a conversation turns to something else, seen as each message comes.

A logistic regression on how like the messages before it a message is: a few cosines and what kind of sentence it is, which
carry over from one kind of conversation to another where a classifier of whole embeddings does not. It knows no database
and no model.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WEIGHTS_FILE = Path(__file__).parent / "topic_weights.json"
BACK = 4  # messages before it that a message is compared with


def compute_features(texts: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """How each message but the first compares with those before it (n - 1 × 10). `vectors` (n × d) have unit length."""
    rows = []
    for now in range(1, len(texts)):
        before = vectors[max(0, now - BACK) : now]
        alike = (before @ vectors[now])[::-1]
        mean = before.mean(axis=0)
        rows.append(
            [
                alike[0],
                alike[1] if len(alike) > 1 else alike[0],
                alike.max(),
                alike.mean(),
                float(mean @ vectors[now]) / (float(np.linalg.norm(mean)) or 1.0),
                float(vectors[now - 1] @ vectors[now - 2]) if now > 1 else 0.5,
                float(texts[now].rstrip().endswith("?")),
                float(texts[now - 1].rstrip().endswith("?")),
                float(np.log1p(len(texts[now].split()))),
                min(now, 10) / 10,
            ]
        )
    return np.array(rows).reshape(-1, 10)


def find_topic_starts(texts: Sequence[str], vectors: np.ndarray, path: Path = WEIGHTS_FILE) -> np.ndarray:
    """Whether each message (n, bool) begins a new topic; the first does."""
    learned = json.loads(path.read_text())
    if not len(texts):
        return np.zeros(0, bool)
    chance = compute_features(texts, vectors) @ np.array(learned["weights"]) + learned["bias"]
    return np.concatenate([[True], chance > learned["threshold"]])
