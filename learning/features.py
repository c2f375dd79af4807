"""Features: what an answer is like, in a few numbers that have names.

They name what people say about answers: how long they are, whether they ask back, how they speak. Each is in units of its
own in which a difference of one is large, so that none needs scaling by what happens to be at hand. Words are looked for in
English; an answer in another language has none of them. It knows no people and no policy.
"""

import math
import re
from collections.abc import Callable

import numpy as np

from bot.embeddings import Embedder

EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")


def _has(pattern: str, flags: int = re.IGNORECASE) -> Callable[[str], float]:
    found = re.compile(pattern, flags)
    return lambda text: float(found.search(text) is not None)


NAMED: dict[str, Callable[[str], float]] = {
    "length": lambda text: math.log1p(len(text.split())),  # doubled, it is 0.7 more
    "sentences": lambda text: math.log1p(len(re.findall(r"[.!?…]+(?:\s|$)", text))),
    "long words": lambda text: float(np.mean([len(word) for word in text.split() or [""]])) / 4,
    "asks back": _has(r"\?\W*$"),
    "question": _has(r"\?"),
    "exclamation": _has("!"),
    "emoji": lambda text: float(EMOJI.search(text) is not None),
    "list": _has(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE),
    "emphasis": _has(r"\*\w|\b[A-Z]{3,}\b", 0),
    "code": _has("`"),
    "number": _has(r"\d"),
    "you": _has(r"\b(you|your|yours|yourself)\b"),
    "I": _has(r"\b(i|me|my|mine|myself)\b"),
    "we": _has(r"\b(we|us|our|let's)\b"),
    "contractions": _has(r"\w['’]\w"),
    "hedging": _has(r"\b(maybe|perhaps|might|could|may|probably|possibly|seems?|i think|not sure)\b"),
    "thanks or regrets": _has(r"\b(thanks?|thank|sorry|please|glad|welcome)\b"),
    "small letters": _has(r"^\W*[a-z]", 0),
}


def features(answers: list[str], embedder: Embedder | None = None) -> np.ndarray:
    """What answers are like (n × features): what has a name, and their meaning if there is an embedder."""
    named = np.array([[measure(text) for measure in NAMED.values()] for text in answers], dtype=float)
    named = named.reshape(len(answers), len(NAMED))
    return named if embedder is None else np.hstack([named, embedder.encode(answers)])
