"""FeatureSpace: place answers in a space of few named features, in which one unit is one standard deviation.

The features are the named ones of `learning.data.features`, whether the answer ended by itself, its mean log-probability,
and the first principal components of its embedding. They are standardised by what the policy's answers usually are, and cut
at LIMIT: no answer is further from the usual than the answers that people judged can tell about.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bot.memory.embedder import Embedder
from learning.data.features import NAMED_FEATURES, extract_features

LIMIT = 3.0  # standard deviations from the mean
COMPONENTS = 12  # of the embedding
LEAST_ANSWERS = 2 * COMPONENTS  # for components; with fewer there are none
SMALLEST_SD = 0.05  # a feature that hardly varies says nothing


@dataclass(frozen=True)
class AnswerText:
    """An answer as text, whether it ended by itself, and its mean log-probability (nats a token; None if unknown)."""

    text: str
    is_finished: bool = True
    mean_logprob: float | None = None


class FeatureExtractor:
    """Computes raw features of answers: (n × raw). It remembers those of the latest texts, because embedding is slow."""

    def __init__(self, embedder: Embedder | None, size: int = 8192):
        self._embedder, self._size = embedder, size
        self._known: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()  # for `_known`: a choice and a fit extract at the same time, each in a thread

    def extract(self, answers: Sequence[AnswerText]) -> np.ndarray:
        """Return the named features, `ended` and the log-probability (NaN if unknown), then the embedding (n × raw)."""
        with self._lock:
            known = {one.text: self._known.get(one.text) for one in answers}
        if new := [text for text, row in known.items() if row is None]:
            known |= (found := dict(zip(new, extract_features(new, self._embedder), strict=True)))
            with self._lock:
                self._known |= found
                while len(self._known) > self._size:
                    del self._known[next(iter(self._known))]
        rows = [known[one.text] for one in answers]
        sampled = [[float(one.is_finished), np.nan if one.mean_logprob is None else one.mean_logprob] for one in answers]
        named, embedded = np.split(np.array(rows), [len(NAMED_FEATURES)], axis=1)
        return np.hstack([named, np.array(sampled), embedded])

    def forget(self) -> None:
        """Drop all texts."""
        with self._lock:
            self._known.clear()


NAMED = (*NAMED_FEATURES, "ended", "log-probability")


@dataclass(frozen=True)
class FeatureSpace:
    """The mean and standard deviation of each feature, and the components (k × dimensions) of the centred embedding."""

    names: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    components: np.ndarray
    centre: np.ndarray

    @classmethod
    def fit(cls, raw: np.ndarray) -> "FeatureSpace":
        """Fit the space to the raw features (n × raw) of the policy's usual answers."""
        _, embedded = _split(raw)
        centre = embedded.mean(0)
        components = np.zeros((0, embedded.shape[1]))
        if len(raw) >= LEAST_ANSWERS and embedded.shape[1]:
            components = np.linalg.eigh(np.cov(embedded.T))[1].T[: -COMPONENTS - 1 : -1]
        values = _project(raw, components, centre)
        # NaN marks an unknown log-probability; without any known one the feature is 0
        known = np.isfinite(values).any(0)
        mean, sd = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        mean[known], sd[known] = np.nanmean(values[:, known], axis=0), np.nanstd(values[:, known], axis=0)
        names = (*NAMED, *(f"topic {number + 1}" for number in range(len(components))))
        return cls(names, mean, sd, components, centre)

    def place(self, raw: np.ndarray) -> np.ndarray:
        """Return the places (n × features) of answers with raw features (n × raw). They are finite."""
        values = (_project(raw, self.components, self.centre) - self.mean) / np.maximum(self.sd, SMALLEST_SD)
        return np.clip(np.nan_to_num(values), -LIMIT, LIMIT)

    @property
    def group_sizes(self) -> tuple[int, int]:
        """The number of named features, and of components."""
        return len(NAMED), len(self.components)

    def as_json(self) -> dict[str, Any]:
        """Return the space as JSON values."""
        return {
            "names": [*self.names],
            **{key: getattr(self, key).tolist() for key in ("mean", "sd", "components", "centre")},
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "FeatureSpace":
        """Return the space that `as_json` gave."""
        arrays = {key: np.array(values[key], dtype=float) for key in ("mean", "sd", "components", "centre")}
        arrays["components"] = arrays["components"].reshape(len(values["components"]), len(arrays["centre"]))
        return cls(tuple(values["names"]), **arrays)


def _split(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the named features, NaN where they are not finite, and the embedding, which is finite."""
    named, embedded = np.split(raw, [len(NAMED)], axis=1)
    return np.where(np.isfinite(named), named, np.nan), np.nan_to_num(embedded, posinf=0.0, neginf=0.0)


def _project(raw: np.ndarray, components: np.ndarray, centre: np.ndarray) -> np.ndarray:
    named, embedded = _split(raw)
    return np.hstack([named, (embedded - centre) @ components.T])
