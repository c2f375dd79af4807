"""Topics: finds the messages that begin a new topic, from the messages up to each.

It is a logistic regression on a few cosines to the messages before, and on the kind of sentence. Unlike a classifier of
whole embeddings, these features carry over from one kind of conversation to another.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WEIGHTS_FILE = Path(__file__).parent / "topic_weights.json"
BACK = 4  # earlier messages with which a message is compared


def compute_features(texts: Sequence[str], vectors: np.ndarray) -> np.ndarray:
    """Return the features (n - 1 × 10) of each message but the first. `vectors` (n × d) have unit length."""
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
    """Tell of each message (n, bool) whether it begins a new topic; the first does."""
    learned = json.loads(path.read_text())
    if not len(texts):
        return np.zeros(0, bool)
    chance = compute_features(texts, vectors) @ np.array(learned["weights"]) + learned["bias"]
    return np.concatenate([[True], chance > learned["threshold"]])
