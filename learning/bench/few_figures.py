"""FewFigures: the cells of ``kibitz bench learning --slice few``, their figures and their picture.

Win rates are means over series, with 95% bootstrap intervals over them.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np

from bot.accelerator import has_gpu
from learning.bench.curves import describe_mean, draw_means
from learning.bench.few import FewCell, FewPoint
from learning.bench.grid import PEOPLE_KINDS, SEEDS, count_reactions_to
from learning.bench.simulated_people import LANGUAGES, choose_defaults

REPORTED = {"served": (20, 50, 200), "weights": (50, 100), "placebo_served": (20, 50, 200), "placebo_weights": (50,)}
COLOURS = {"served": "tab:green", "weights": "tab:blue", "placebo_served": "black", "placebo_weights": "tab:gray"}


@dataclass(frozen=True)
class Size:
    """The built-in kinds of people, their languages, the arms that train, the series in each of them, and the numbers of
    reactions after which served answers and single ones are judged.
    """

    kinds: tuple[str, ...]
    languages: tuple[str, ...]
    trained: tuple[str, ...]
    trained_series: int
    served: tuple[int, ...]
    weights: tuple[int, ...]


def choose_size(is_toy: bool) -> Size:
    """Return the size for the toy policy (12 minutes on two cores), or for any other model.

    Without a GPU another model takes about an hour, with one series of weights in each language: too few for a claim.
    """
    if is_toy:
        return Size(
            PEOPLE_KINDS, ("",), ("weights", "placebo_weights"), SEEDS, (10, 20, 30, 40, 50, 100, 200), (20, 50, 100)
        )
    users = choose_defaults(is_toy=False).users
    series = SEEDS if has_gpu() else len(LANGUAGES)
    return Size((users,), LANGUAGES, ("weights",), series, (10, 20, 30, 40, 50), (20, 50))


def choose_cells(size: Size, users: str | None, seed: int) -> list[FewCell]:
    """Return the cells, for the built-in kinds of people or for one sort of `users`, with seeds from `seed` on."""
    kinds = size.kinds if users is None else (users,)
    served = [
        FewCell("served", kinds, seed + number, size.served, language)
        for number in range(SEEDS)
        for language in size.languages
    ]
    # A series of weights takes minutes, so each seed has one at most, with one kind of people and one language.
    people = cycle((kind, language) for kind in kinds for language in size.languages)
    each = [(seed + number, *one) for number, one in zip(range(size.trained_series), people, strict=False)]
    trained = [
        FewCell(arm, (kind,), number, size.weights, language) for arm in size.trained for number, kind, language in each
    ]
    return [*trained, *served]  # the longest first, so that no process is left alone with them


def _split_series(found: dict[FewCell, list[FewPoint]]) -> list[list[FewPoint]]:
    """Return the points of each series in the cells."""
    series: defaultdict[tuple[Any, ...], list[FewPoint]] = defaultdict(list)
    for point in chain.from_iterable(found.values()):
        series[point.arm, point.users, point.seed, point.language].append(point)
    return [*series.values()]


def compute_figures(found: dict[FewCell, list[FewPoint]]) -> dict[str, Any]:
    """Compute the figures of all series in the cells."""
    series = _split_series(found)
    made: dict[str, Any] = {}
    for arm, steps in REPORTED.items():
        for step in steps:
            made |= describe_mean(f"{arm}_win_rate_{step}", [one.win_rate for one in _find(series, arm, step)])
    ends = [points[-1] for points in series]
    made |= describe_mean("oracle_win_rate", [one.oracle for one in ends if one.arm == "served" and one.oracle is not None])
    by_lot = [one for one in ends if one.arm == "placebo_served"]
    for last in {one.reactions for one in by_lot}:
        made |= describe_mean(f"placebo_switched_on_{last}", [float(one.candidates > 1) for one in by_lot])
    for arm in ("served", "weights"):
        curves = _find_curves(series, arm)
        mean = [float(np.mean([one.win_rate for one in column])) for column in zip(*curves, strict=True)]
        counts = [one.reactions for one in curves[0]] if curves else []
        made[f"{arm}_reactions_to_80"] = count_reactions_to(0.8, mean, counts)
    trained = [one for one in ends if one.arm == "weights"]
    for name in ("well_formed", "perplexity_ratio"):
        made |= describe_mean(name, [getattr(one, name) for one in trained])
    for arm, step in (("served", 20), ("served", 50), ("weights", 50), ("weights", 100)):
        points = _find(series, arm, step)
        for label in ("users", "language"):
            for name in filter(None, dict.fromkeys(getattr(one, label) for one in points)):
                rates = [one.win_rate for one in points if getattr(one, label) == name]
                made[f"{arm}_win_rate_{step}_{Path(name).stem}"] = float(np.mean(rates))
    for language in filter(None, dict.fromkeys(one.language for one in ends)):
        oracle = [one.oracle for one in ends if one.language == language and one.arm == "served"]
        made[f"oracle_win_rate_{language}"] = float(np.mean([one for one in oracle if one is not None]))
    return made


def plot(found: dict[FewCell, list[FewPoint]], path: Path) -> None:
    """Plot win rates over version 0 against reactions, one line for each arm, with intervals over series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = _split_series(found)
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for arm, colour in COLOURS.items():
        curves = _find_curves(series, arm)
        if not curves:
            continue
        reactions = [0, *(one.reactions for one in curves[0])]
        wins = np.array([[0.5, *(one.win_rate for one in points)] for points in curves])
        style = "--" if arm.startswith("placebo") else "-"
        label = arm.replace("_", ", ").replace("placebo", "reactions by lot")
        draw_means(axes, reactions, wins, style, label=label, color=colour)
    axes.axhline(0.8, color="tab:gray", linewidth=0.6, linestyle=":")
    axes.set(xlabel="reactions", ylabel="win rate over version 0, held-out prompts", ylim=(0.2, 1.02))
    axes.set_title("10% of the reactions are mistaken; mean and 95% interval over series", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _find(series: Sequence[Sequence[FewPoint]], arm: str, step: int) -> list[FewPoint]:
    return [one for points in series for one in points if one.arm == arm and one.reactions == step]


def _find_curves(series: Sequence[Sequence[FewPoint]], arm: str) -> list[Sequence[FewPoint]]:
    return [points for points in series if points[0].arm == arm]
