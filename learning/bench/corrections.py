"""Benchmark: what corrections teach, if each is also preferred to answers of the policy's own.

Simulated people correct answers that they do not like: they write the best of many answers by their hidden utility. The
policy is trained on the corrections and on the answers that they correct, without a reward head.

- *own_answers*: as in production (`learning.training.demonstrations`).
- *repeated*: the control. As many further rows of the same weight, which have the corrected answer again.
- *plain*: no further rows.

Prompts by which answers are judged are never corrected.

Run: ``kibitz bench learning --slice corrections``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bot.config import Config
from bot.models.tokenizer import ChatTokenizer
from learning.bench.arena import Arena, MakeFurther, Point, make_experience, prepare_process, train_policy
from learning.bench.curves import describe_mean, draw_means
from learning.bench.grid import PEOPLE_KINDS, SEEDS
from learning.bench.simulated_people import Utility, find_utility, read_prompts
from learning.data.experience import Experience
from learning.models.trainable import as_base
from learning.training.demonstrations import prefer_to_own_answers
from learning.training.pretrain import is_toy

COUNTS = (5, 10, 20)  # corrections after which the policy is trained and judged
DRAFTS = 32  # answers of which people write the best
COLOURS = {"own_answers": "tab:green", "repeated": "tab:orange", "plain": "tab:gray"}


@dataclass(frozen=True)
class CorrectionsCell:
    """One series of corrections: its arm, its people and its seed."""

    arm: str
    users: str
    seed: int

    def describe(self) -> str:
        """Describe the cell to people who wait for it."""
        return f"{self.arm} with {Path(self.users).stem}"


def repeat_corrected(config: Config, model: Any, tokenizer: ChatTokenizer, rows: Sequence[Experience]) -> list[Experience]:
    """Return as many rows as `prefer_to_own_answers`, of the same weight, with the corrected answers."""
    corrected = [
        replace(one, completion_ids=one.rejected_ids or (), rejected_ids=None, is_correction=False, advantage=-one.advantage)
        for one in rows
        if one.is_correction and one.advantage > 0
    ]
    count = 2 * config.learning.own_answers
    return [replace(one, advantage=one.advantage / count) for one in corrected for _ in range(count)]


def add_nothing(config: Config, model: Any, tokenizer: ChatTokenizer, rows: Sequence[Experience]) -> list[Experience]:
    """Return no further rows."""
    return []


ARMS: dict[str, MakeFurther] = {"own_answers": prefer_to_own_answers, "repeated": repeat_corrected, "plain": add_nothing}


def choose_cells(users: str | None, seed: int) -> list[CorrectionsCell]:
    """Return the cells, one kind of people for each seed from `seed` on, or one sort of `users`."""
    kinds = PEOPLE_KINDS if users is None else (users,)
    return [CorrectionsCell(arm, kinds[number % len(kinds)], seed + number) for number in range(SEEDS) for arm in ARMS]


def run_cell(config: Config, base_model: str, cell: CorrectionsCell) -> list[Point]:
    """Run a cell, and return its points. Meant for a process of its own."""
    prepare_process(cell.seed)
    config = config.model_copy(update={"learning": config.learning.model_copy(update={"distil_prompts": 0})})
    arena = Arena(config, base_model, cell.seed, read_prompts(is_toy(base_model)))
    utility, rng = find_utility(cell.users), random.Random(f"{cell.seed} {cell.users}")
    rows: list[Experience] = []
    points = []
    for count in COUNTS:
        while len(rows) < 2 * count:
            rows += _correct(arena, utility, rng)
        end = train_policy(arena, rows, config.training.objective, count, ARMS[cell.arm])
        points.append(arena.judge_policy(count, utility, end))
    return points


def _correct(arena: Arena, utility: Utility, rng: random.Random) -> list[Experience]:
    """Have somebody ask something, and return the answer and its correction; nothing if it needs none, or there is none."""
    asked = rng.choice(arena.said)
    [answer] = arena.generate_answers([asked], rng.randrange(2**31))
    with as_base(arena.model):
        drafts = arena.generate_answers([asked] * DRAFTS, rng.randrange(2**31))
    best = max(drafts, key=lambda one: (utility(asked, one.text), one.is_well_formed))
    if utility(asked, answer.text) > 0 or utility(asked, best.text) <= 0:
        return []
    worth = arena.config.rewards.correction
    disliked = replace(make_experience(arena, asked, answer, False, rng), reward=worth)
    liked = replace(make_experience(arena, asked, best, True, rng), unit=disliked.unit)
    return [disliked, replace(liked, rejected_ids=answer.completion_ids, is_correction=True)]


def compute_figures(found: dict[CorrectionsCell, list[Point]]) -> dict[str, Any]:
    """Compute the figures of all arms: the win rate after each number of corrections, and what else the last ones did."""
    made: dict[str, Any] = {}
    for arm in ARMS:
        rows = [points for cell, points in found.items() if cell.arm == arm]
        described = {f"win_rate_{count}": [points[at].win_rate for points in rows] for at, count in enumerate(COUNTS)}
        for name in ("well_formed", "perplexity_ratio", "kl"):
            described[name] = [getattr(points[-1], name) for points in rows]
        for name, values in described.items():
            made |= describe_mean(f"{arm}_{name}", values)
    return made


def plot(found: dict[CorrectionsCell, list[Point]], path: Path) -> None:
    """Plot the win rate after each number of corrections, one line for each arm, with intervals over series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for arm, colour in COLOURS.items():
        curves = np.array([[0.5, *(one.win_rate for one in points)] for cell, points in found.items() if cell.arm == arm])
        draw_means(axes, (0, *COUNTS), curves, label=arm.replace("_", " "), color=colour)
    axes.set(xlabel="corrections", ylabel="win rate over version 0, held-out prompts", ylim=(0.2, 1.02))
    axes.set_title("mean and 95% interval over series", fontsize=10)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
