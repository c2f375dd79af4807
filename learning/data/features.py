"""Features: describe an answer by a few named numbers, and predict the reward of similar answers.

The features are what people comment on: length, asking back, manner of speaking. In the units of each feature a difference
of one is large, so the features need no scaling to the data. Word features match English only; they are 0 for answers in
other languages.
"""

import math
import re
from collections.abc import Callable

import numpy as np

from bot.memory.embedder import Embedder

RIDGE = 16.0  # 1 / 0.25²: the noise of rewards is about 1, the effect of a feature about 0.25
EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")


def _make_matcher(pattern: str, flags: int = re.IGNORECASE) -> Callable[[str], float]:
    found = re.compile(pattern, flags)
    return lambda text: float(found.search(text) is not None)


NAMED_FEATURES: dict[str, Callable[[str], float]] = {
    "length": lambda text: math.log1p(len(text.split())),  # twice the length is 0.7 more
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
    """Return the features of answers (n × features): the named ones, and the embedding if there is an embedder."""
    named = np.array([[measure(text) for measure in NAMED_FEATURES.values()] for text in answers], dtype=float)
    named = named.reshape(len(answers), len(NAMED_FEATURES))
    return named if embedder is None else np.hstack([named, embedder.encode(answers)])


def ridge_influence(seen: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the influence (n × features) of each reward on each feature's coefficient, for features `seen` (n × features).

    Ridge regression (Hoerl and Kennard, 1970, "Ridge Regression: Biased Estimation for Nonorthogonal Problems") is linear in
    the rewards: centred features x predict `x @ ridge_influence(seen).T @ rewards` over the mean reward. `weights` (n,),
    in [0, 1], are the weights of the rows.
    """
    root = np.sqrt(np.ones(len(seen)) if weights is None else weights)[:, None]
    rows = (seen - np.average(seen, axis=0, weights=root[:, 0] ** 2)) * root
    return np.linalg.solve(rows @ rows.T + RIDGE * np.eye(len(rows)), rows) * root


def predict_rewards(rewards: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Predict the reward of each answer relative to the mean (n,), from `rewards` (n,) of all with their `weights` (n,)."""
    if not weights.any():
        return np.zeros(len(rewards))
    centred = seen - np.average(seen, axis=0, weights=weights)
    return centred @ ridge_influence(seen, weights).T @ rewards
