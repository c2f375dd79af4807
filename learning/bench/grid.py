"""Benchmark: compare what the objectives learn from reactions, beside a frozen and a placebo control.

A policy is trained after a number of reactions, again and again. The grid is over kinds of people, noise, reaction rates and
seeds. A cell runs with one thread.

Run: ``kibitz bench learning --slice ci``.
"""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bot.config import Config
from bot.errors import ConfigError, NothingToLearn
from learning.bench.arena import Arena, Point, ReactingPeople, RunEnd, prepare_process, talk, train_policy
from learning.bench.simulated_people import find_utility, read_prompts
from learning.data.experience import Experience
from learning.judging.statistics import mean_interval
from learning.training.pretrain import is_toy

OBJECTIVES = ("kto", "bco", "dpo", "sft", "pg", "mixed")
CONTROLS = ("frozen", "placebo")
ARMS = (*OBJECTIVES, *CONTROLS)
RATES = [one for one in product((0.0, 0.1, 0.2), (1.0, 0.2, 0.05)) if one != (0.1, 1.0)]  # (noise, reaction rate)
PEOPLE_KINDS = ("brief", "casual", "curious", "detailed", "formal")  # length, tone, content; and two opposites
SEEDS = 5
STEPS = (40, 80, 120, 160, 200)  # reactions after which a version is trained and judged
SLICES = ("ci", "rates", "regimes", "full")


@dataclass(frozen=True)
class Cell:
    """One policy and its people. `arm` is an objective, `frozen` (never trained), or `placebo` (the default objective, on
    shuffled reactions). `regime` is "fresh" (it learns from its own answers), "logged" (from version 0's), or
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


def run_cell(config: Config, base_model: str, cell: Cell) -> list[Point]:
    """Train one policy and score it after each number of reactions in STEPS. Meant for a process of its own.

    With "drift" people want the opposite after the last of STEPS, and STEPS are run through again.
    """
    prepare_process(cell.seed)
    # An objective is measured by what it makes of the reactions alone.
    config = config.model_copy(update={"learning": config.learning.model_copy(update={"distil_prompts": 0})})
    objective = config.training.objective if cell.arm in CONTROLS else cell.arm
    arena = Arena(config, base_model, cell.seed, read_prompts(is_toy(base_model)))
    wanted = find_utility(cell.users)
    rng = random.Random(f"{cell.seed} {cell.users} {cell.noise} {cell.rate}")
    people = ReactingPeople(wanted, cell.noise, cell.rate, rng)
    turn = STEPS[-1]
    said: list[Experience] = []
    points: list[Point] = []
    for number, count in enumerate((*STEPS, *(turn + step for step in STEPS)) if cell.regime == "drift" else STEPS):
        if count > turn:
            people = replace(people, utility=lambda prompt, reply: -wanted(prompt, reply))
        if cell.regime == "logged":
            arena.reset_policy()
        said += talk(arena, people, count - len(said))
        run = RunEnd()
        if cell.arm != "frozen":
            taught = shuffle_rewards(said, people.rng) if cell.arm == "placebo" else said
            with contextlib.suppress(NothingToLearn):  # for example, no pairs yet: the policy stays as it is
                run = train_policy(arena, taught, objective, number)
        points.append(arena.judge_policy(count, people.utility, run))
    return points


def shuffle_rewards(said: Sequence[Experience], rng: random.Random) -> list[Experience]:
    """Return the same answers with their reactions shuffled."""
    rewards = [one.reward for one in said]
    rng.shuffle(rewards)
    return [replace(one, reward=reward) for one, reward in zip(said, rewards, strict=True)]


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
