"""The grid of `kibitz bench learning`: objectives and controls, over kinds of people, noise, reaction rates and seeds.

`learning.bench.learning` runs a cell, in a process of its own, with one thread.

Run: ``kibitz bench learning``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bot.config import Config
from bot.errors import ConfigError
from bot.types import Progress
from learning.bench import jobs
from learning.bench.learning import STEPS, Point, run_cell
from learning.judging.statistics import mean_interval

OBJECTIVES = ("kto", "bco", "dpo", "sft", "pg", "mixed")
CONTROLS = ("frozen", "placebo")
ARMS = (*OBJECTIVES, *CONTROLS)
RATES = [one for one in product((0.0, 0.1, 0.2), (1.0, 0.2, 0.05)) if one != (0.1, 1.0)]  # (noise, reaction rate)
PEOPLE_KINDS = ("brief", "casual", "curious", "detailed", "formal")  # length, tone, content; and two opposites
SEEDS = 5
SLICES = ("ci", "rates", "regimes", "full")


@dataclass(frozen=True)
class Cell:
    """One policy and its people. `regime` is "fresh" (it learns from its own answers), "logged" (from version 0's), or
    "drift" (from people who want the opposite in the second half).
    """

    arm: str
    users: str
    seed: int
    noise: float = 0.1
    rate: float = 1.0
    regime: str = "fresh"

    def describe(self) -> str:
        """Describe the cell to people who wait for it."""
        return f"{self.arm} with {Path(self.users).stem}"


def choose_cells(part: str, users: str | None, arms: str | None = None, seed: int = 0) -> list[Cell]:
    """Return the cells of a slice, for all arms or the comma-separated `arms`, with seeds from `seed` on.

    `ci` has one kind of people per seed, 10% noise, and a reaction to every answer. `rates` varies noise and reaction rate.
    `regimes` has "logged" and "drift". `full` has all of these, with three kinds of people for each seed. Raises ConfigError
    for an unknown arm.
    """
    chosen = ARMS if arms is None else tuple(arms.split(","))
    if not set(chosen) <= set(ARMS):
        raise ConfigError(f"--arms has value '{arms}'; choose from {','.join(ARMS)}")
    kinds = PEOPLE_KINDS if users is None else (users,)
    small = [Cell(arm, kinds[number % len(kinds)], seed + number) for number, arm in product(range(SEEDS), chosen)]
    rates = [replace(cell, noise=noise, rate=rate) for (noise, rate), cell in product(RATES, small)]
    regimes = [replace(cell, regime=regime) for regime, cell in product(("drift", "logged"), small)]
    each = [*small, *rates, *regimes]
    whole = dict.fromkeys([*each, *(replace(cell, users=kind) for kind, cell in product(kinds[:3], each))])
    slices = {"ci": small, "rates": rates, "regimes": regimes, "full": list(whole)}
    return slices[part]


def run_cells(
    config: Config, base_model: str, wanted: Sequence[Cell], kept: Path, progress: Progress
) -> dict[Cell, list[Point]]:
    """Run cells, each in a process of its own, and return their points. Finished cells are kept in the file `kept`."""
    found = jobs.run_cells(_run, config, base_model, wanted, kept, progress)
    return {cell: [Point(**row) for row in rows] for cell, rows in found.items()}


def _run(config: Config, base_model: str, cell: Cell) -> jobs.Rows:
    return [asdict(point) for point in run_cell(config, base_model, **asdict(cell))]


def compute_figures(found: dict[Cell, list[Point]], default: str) -> dict[str, Any]:
    """Compute the figures of each arm over its cells in the first setting (10% noise, a reaction to every answer), and in
    each other setting. Figures of the arm `default` are repeated under the name "default".
    """
    made: dict[str, Any] = {}
    for arm in dict.fromkeys(cell.arm for cell in found):
        for cell in dict.fromkeys(_drop_people_and_seed(cell) for cell in found if cell.arm == arm):
            same = [points for other, points in found.items() if _drop_people_and_seed(other) == cell]
            if cell == Cell(arm, "", 0):
                made |= {f"{arm}_{name}": value for name, value in _compute_arm_figures(same).items()}
            else:
                label = f"{arm}_noise_{cell.noise:g}_rate_{cell.rate:g}_{cell.regime}"
                interval = mean_interval([points[-1].win_rate for points in same], seed=0)
                made |= dict(zip((f"{label}_win_rate{part}" for part in ("", "_low", "_high")), interval, strict=True))
                if cell.regime == "drift":
                    made[f"{label}_reactions_to_recover"] = count_reactions_to_recover(
                        [[one.win_rate for one in points] for points in same]
                    )
    made |= {name.replace(default, "default", 1): value for name, value in made.items() if name.startswith(f"{default}_")}
    return made


def _drop_people_and_seed(cell: Cell) -> Cell:
    """Return the setting of a cell: the cell without its people and seed."""
    return replace(cell, users="", seed=0)


def _compute_arm_figures(rows: Sequence[Sequence[Point]]) -> dict[str, Any]:
    wins = np.array([[point.win_rate for point in points] for points in rows])
    last = [points[-1] for points in rows]
    mean, low, high = mean_interval(wins[:, -1].tolist(), seed=0)
    return {
        "win_rate_200": mean,
        "win_rate_200_low": low,
        "win_rate_200_high": high,
        "win_rate_200_ties_half": float(np.mean([point.win_rate_ties_half for point in last])),
        "reactions_to_65": count_reactions_to(0.65, wins.mean(0)),
        "reactions_to_80": count_reactions_to(0.80, wins.mean(0)),
        "utility_200": float(np.mean([point.utility for point in last])),
        "well_formed": float(np.mean([point.well_formed for point in last])),
        "perplexity_ratio": float(np.mean([point.perplexity_ratio for point in last])),
        "kl": float(np.mean([point.kl for point in last])),
        "stopped": sum(point.stopped for points in rows for point in points),
        "drifts": sum(point.drifted for points in rows for point in points),
    }


def count_reactions_to(goal: float, curve: Sequence[float], steps: Sequence[int] = STEPS) -> float | None:
    """Return after how many reactions a mean win rate reaches `goal`, interpolated linearly, or None if it never does.

    `curve` has the win rate after each number of `steps`.
    """
    before, at = 0.5, 0
    for rate, step in zip(curve, steps, strict=True):
        if rate >= goal:
            return at + (step - at) * (goal - before) / (rate - before)
        before, at = float(rate), step
    return None


def count_reactions_to_recover(curves: Sequence[Sequence[float]]) -> float | None:
    """Return how many reactions after a change of taste restore nine tenths of the gain before it, or None."""
    mean = np.mean(curves, axis=0)
    goal = 0.5 + 0.9 * (mean[len(STEPS) - 1] - 0.5)
    return next((float(step) for step, rate in zip(STEPS, mean[len(STEPS) :], strict=True) if rate >= goal), None)


def plot(found: dict[Cell, list[Point]], path: Path) -> None:
    """Plot win rates over version 0 against reactions in the first setting, one line per arm, with intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    shown = _drop_people_and_seed(next(iter(found)))
    for arm in dict.fromkeys(cell.arm for cell in found):
        rows = [points for cell, points in found.items() if _drop_people_and_seed(cell) == replace(shown, arm=arm)]
        reactions = (0, *(point.reactions for point in rows[0]))
        wins = np.array([[0.5, *(point.win_rate for point in points)] for points in rows])
        spread = np.array([mean_interval(column.tolist(), seed=0) for column in wins.T])
        style = {"linestyle": "--", "color": "tab:gray" if arm == "frozen" else "black"} if arm in CONTROLS else {}
        line = axes.plot(reactions, spread[:, 0], marker="o", markersize=3, label=arm, **style)
        axes.fill_between(reactions, spread[:, 1], spread[:, 2], color=line[0].get_color(), alpha=0.12, linewidth=0)
    axes.axhline(0.8, color="tab:gray", linewidth=0.6, linestyle=":")
    meant = "; after 200 people want the opposite" if shown.regime == "drift" else ""
    axes.set(
        xlabel="reactions", ylabel="win rate over version 0, held-out prompts", ylim=(0.0, 1.02) if meant else (0.35, 1.02)
    )
    axes.set_title(f"10% of the reactions are mistaken{meant}; mean and 95% interval over seeds", fontsize=10)
    axes.legend(loc="upper left", frameon=False, ncols=2, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
