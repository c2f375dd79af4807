"""Slices: the parts of ``kibitz bench learning``, by the names that ``--slice`` knows."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bot.config import Config
from bot.errors import ConfigError
from bot.types import Progress
from learning.bench import corrections, few, few_figures, grid, hacking, jobs
from learning.bench.arena import Point

WITH_OWN_ARMS = ("few", "corrections", "hacking")


@dataclass(frozen=True)
class Slice:
    """One part of the benchmark: its cells, the function that runs one of them, and what to make of their points."""

    cells: list[Any]
    run_cell: Callable[[Config, str, Any], list[Any]]
    make_point: Callable[..., Any]
    compute_figures: Callable[[Any], dict[str, Any]]  # of the points of all cells, by cell
    plot: Callable[[Any, Path], None]

    def run(self, config: Config, base_model: str, kept: Path, progress: Progress) -> dict[Any, list[Any]]:
        """Run the cells, and return the points of each. Finished ones are kept in a file (`jobs.run_cells`)."""
        return jobs.run_cells(self.run_cell, self.make_point, config, base_model, self.cells, kept, progress)


def find_slice(part: str, users: str | None, arms: str | None, config: Config, is_toy: bool) -> Slice:
    """Return a slice with its cells chosen. Raises ConfigError for an unknown slice or arm."""
    known = (*WITH_OWN_ARMS, *grid.SLICES)
    if part not in known:
        raise ConfigError(f"--slice has value '{part}'; choose one of {', '.join(known)}")
    if part in grid.SLICES:
        compute_figures = partial(grid.compute_figures, default=config.training.objective)
        cells: list[Any] = grid.choose_cells(part, users, arms, config.seed)
        return Slice(cells, grid.run_cell, Point, compute_figures, grid.plot)
    if arms is not None:
        raise ConfigError(f"option --arms has value '{arms}', and --slice {part} has its own arms; leave --arms out")
    if part == "few":
        cells = few_figures.choose_cells(few_figures.choose_size(is_toy), users, config.seed)
        return Slice(cells, few.run_cell, few.FewPoint, few_figures.compute_figures, few_figures.plot)
    if part == "corrections":
        cells = corrections.choose_cells(users, config.seed)
        return Slice(cells, corrections.run_cell, Point, corrections.compute_figures, corrections.plot)
    cells = hacking.choose_cells(users, config.seed)
    return Slice(cells, hacking.run_cell, Point, hacking.compute_figures, hacking.plot)
