"""Features: what an answer is like, in a few numbers that have names, and what answers like it earned.

They name what people say about answers: how long they are, whether they ask back, how they speak. Each is in units of its
own in which a difference of one is large, so that none needs scaling by what happens to be at hand. Words are looked for in
English; an answer in another language has none of them. It knows no people and no policy.
"""

import math
import re
from collections.abc import Callable

import numpy as np

from bot.memory.embedder import Embedder

RIDGE = 16.0  # rewards scatter by about 1 around a taste that is worth about 0.25 for each feature (1 / 0.25²)
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")


def _make_matcher(pattern: str, flags: int = re.IGNORECASE) -> Callable[[str], float]:
    found = re.compile(pattern, flags)
    return lambda text: float(found.search(text) is not None)


NAMED_FEATURES: dict[str, Callable[[str], float]] = {
    "length": lambda text: math.log1p(len(text.split())),  # doubled, it is 0.7 more
    "sentences": lambda text: math.log1p(len(re.findall(r"[.!?…](?:\s|$)|[。！？]", text))),
    "long words": lambda text: math.log1p(float(np.mean([len(word) for word in text.split() or [""]]))),
    "asks back": lambda text: float(re.search(r"[?？]\W*$", text[-100:]) is not None),
    "question": _make_matcher("[?？]"),
    "exclamation": _make_matcher("[!！]"),
    "emoji": lambda text: float(EMOJI.search(text) is not None),
    "list": _make_matcher(r"^[ \t]*([-*•]|\d+[.)])\s", re.MULTILINE),
    "emphasis": _make_matcher(r"\*\w|\b[A-Z]{3,}\b", 0),
    "code": _make_matcher("`"),
    "number": _make_matcher(r"\d"),
    "you": _make_matcher(r"\b(you|your|yours|yourself)\b"),
    "I": _make_matcher(r"\b(i|me|my|mine|myself)\b"),
    "we": _make_matcher(r"\b(we|us|our|let's)\b"),
    "contractions": _make_matcher(r"\w['’]\w"),
    "hedging": _make_matcher(r"\b(maybe|perhaps|might|could|may|probably|possibly|seems?|i think|not sure)\b"),
    "thanks or regrets": _make_matcher(r"\b(thanks?|thank|sorry|please|glad|welcome)\b"),
    "small letters": _make_matcher(r"^\W*[a-z]", 0),
}


def extract_features(answers: list[str], embedder: Embedder | None = None) -> np.ndarray:
    """What answers are like (n × features): what has a name, and their meaning if there is an embedder."""
    named = np.array([[measure(text) for measure in NAMED_FEATURES.values()] for text in answers], dtype=float)
    named = named.reshape(len(answers), len(NAMED_FEATURES))
    return named if embedder is None else np.hstack([named, embedder.encode(answers)])


def ridge_influence(seen: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """What each reward for answers with features `seen` (n × features) counts for each feature (n × features).

    Ridge regression (Hoerl and Kennard, 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems"), which is
    linear in the rewards: answers with features x are worth `x @ ridge(seen).T @ rewards` more than the mean of those seen.
    `weights` (n,), in [0, 1], say how much each of them counts.
    """
    root = np.sqrt(np.ones(len(seen)) if weights is None else weights)[:, None]
    rows = (seen - np.average(seen, axis=0, weights=root[:, 0] ** 2)) * root
    return np.linalg.solve(rows @ rows.T + RIDGE * np.eye(len(rows)), rows) * root


def predict_rewards(rewards: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What answers like each one earned (n,), from the rewards of all of them (n,), which count by `weights` (n,)."""
    if not weights.any():
        return np.zeros(len(rewards))
    centred = seen - np.average(seen, axis=0, weights=weights)
    return centred @ ridge_influence(seen, weights).T @ rewards
