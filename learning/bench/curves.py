"""Curves: means over series with their 95% intervals, as figures and as the lines of a plot."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from learning.judging.statistics import mean_interval


def describe_mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return a mean with its interval, each None without values."""
    found = mean_interval(values, seed=0) if values else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def draw_means(axes: Any, steps: Sequence[int], curves: np.ndarray, style: str = "-", **line: Any) -> None:
    """Draw the mean of `curves` (series × steps) as a line, with the interval as a band; `line` has its color."""
    spread = np.array([mean_interval(column.tolist(), seed=0) for column in curves.T])
    axes.plot(steps, spread[:, 0], style, marker="o", markersize=3, **line)
    axes.fill_between(steps, spread[:, 1], spread[:, 2], color=line["color"], alpha=0.12, linewidth=0)
