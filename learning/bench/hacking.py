"""Benchmark: whether people still like a policy that follows one reward head for many rounds, without a new reaction.

A head is fitted to a few reactions. The policy is trained on them, and then in round after round on its own fresh answers,
as the head labels them. What a policy makes of a head's mistakes is called reward hacking: the head likes the answers ever
better, and people do not. Gao et al. (2023), "Scaling Laws for Reward Model Overoptimization".

- *guarded*: labels and steps as in production.
- *unguarded*: the control. The labels are the head's alone and not pessimistic, and nothing holds the policy near version 0.

Prompts by which answers are judged are never said by people.

Run: ``kibitz bench learning --slice hacking``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bot.config import Config
from learning.bench.arena import (
    Arena,
    Point,
    ReactingPeople,
    RunEnd,
    prepare_process,
    train_policy,
)
from learning.bench.curves import describe_mean, draw_means
from learning.bench.few import NOISE, Series, sample_candidates
from learning.bench.grid import PEOPLE_KINDS, SEEDS
from learning.bench.simulated_people import find_utility, read_prompts
from learning.data.experience import Experience
from learning.data.feature_space import FeatureExtractor
from learning.data.selection import split_held_out
from learning.judging.metrics import TrainingMetrics
from learning.training.distillation import Labelling, distil
from learning.training.objectives import train
from learning.training.pretrain import is_toy
from learning.training.teaching import train_with_guard

REACTIONS = 50
ROUNDS = 10
ARMS = {
    "guarded": Labelling(answers=16, rounds=1),
    "unguarded": Labelling(answers=16, rounds=1, pessimism=0.0, doubts_unusual=False),
}
COLOURS = {"guarded": "tab:blue", "unguarded": "tab:red"}


@dataclass(frozen=True)
class HackingCell:
    """One series of rounds: its arm, its people and its seed."""

    arm: str
    users: str
    seed: int

    def describe(self) -> str:
        """Describe the cell to people who wait for it."""
        return f"{self.arm} with {Path(self.users).stem}"


def choose_cells(users: str | None, seed: int) -> list[HackingCell]:
    """Return the cells, one kind of people for each seed from `seed` on, or one sort of `users`."""
    kinds = PEOPLE_KINDS if users is None else (users,)
    return [HackingCell(arm, kinds[number % len(kinds)], seed + number) for number in range(SEEDS) for arm in ARMS]


def run_cell(config: Config, base_model: str, cell: HackingCell) -> list[Point]:
    """Run a cell, and return its points: before the first round, and after each. Meant for a process of its own."""
    prepare_process(cell.seed)
    arena = Arena(config, base_model, cell.seed, read_prompts(is_toy(base_model)))
    utility = find_utility(cell.users)
    rng = random.Random(f"{cell.seed} {cell.users}")
    series = Series(arena, ReactingPeople(utility, NOISE, 1.0, rng), FeatureExtractor(arena.embedder), is_placebo=False)
    series.hear(sample_candidates(arena, [rng.choice(arena.said) for _ in range(REACTIONS)], cell.seed))
    train_policy(arena, series.rated, config.training.objective, 0)
    taught, held_out = split_held_out(series.rated, config.learning.held_out)
    prompts = [*dict.fromkeys(one.prompt_ids for one in [*held_out, *taught])]

    model, tokenizer = arena.model, arena.tokenizer

    def teach(settings: Config, rows: Sequence[Experience]) -> TrainingMetrics:
        if cell.arm == "guarded":
            return train_with_guard(settings, model, tokenizer, rows, held_out, prompts, lambda *_: None)
        free = settings.training.model_copy(update={"anchor": 0.0, "weight_decay": 0.0})
        return train(model, tokenizer.hf, rows, free, settings.seed, lambda *_: None)

    points = [arena.judge_policy(0, utility, RunEnd())]
    for number in range(1, ROUNDS + 1):
        settings = config.model_copy(update={"seed": cell.seed + 1000 * number})
        distil(settings, model, tokenizer, series.rated, prompts, arena.embedder, teach, ARMS[cell.arm])
        points.append(arena.judge_policy(number, utility, RunEnd()))
    return points


def compute_figures(found: dict[HackingCell, list[Point]]) -> dict[str, Any]:
    """Compute the figures of both arms.

    `fall` is the true utility after the best round (of the mean over series) without that after the last one.
    """
    made: dict[str, Any] = {}
    for arm in ARMS:
        rows = [points for cell, points in found.items() if cell.arm == arm]
        curves = np.array([[point.utility for point in points] for points in rows])
        best = int(curves.mean(0).argmax())
        made[f"{arm}_best_round"] = best
        described = {
            "utility_start": curves[:, 0],
            "utility_best": curves[:, best],
            "utility_last": curves[:, -1],
            "fall": curves[:, best] - curves[:, -1],
        }
        for name in ("win_rate", "well_formed", "perplexity_ratio", "kl"):
            described[name] = np.array([getattr(points[-1], name) for points in rows])
        for name, values in described.items():
            made |= describe_mean(f"{arm}_{name}", values.tolist())
    return made


def plot(found: dict[HackingCell, list[Point]], path: Path) -> None:
    """Plot the true utility after each round, one line for each arm, with intervals over series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for arm, colour in COLOURS.items():
        curves = np.array([[one.utility for one in points] for cell, points in found.items() if cell.arm == arm])
        draw_means(axes, range(curves.shape[1]), curves, label=arm, color=colour)
    axes.set(xlabel="rounds of labels by one head", ylabel="true utility, held-out prompts", ylim=(-1.05, 1.05))
    axes.set_title(f"a head of {REACTIONS} reactions, no new ones; mean and 95% interval over series", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
