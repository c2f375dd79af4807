"""Slices: the parts of ``kibitz bench learning``, by the names that ``--slice`` knows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bot.config import Config
from bot.errors import ConfigError
from bot.types import Progress
from learning.bench import few_figures, grid, hacking

WITH_OWN_ARMS = ("few", "hacking")


@dataclass(frozen=True)
class Slice:
    """One part of the benchmark. What `run` finds is given to the other two."""

    run: Callable[[Config, str, Path, Progress], Any]  # (config, base model, file of finished cells, progress)
    compute_figures: Callable[[Any], dict[str, Any]]
    plot: Callable[[Any, Path], None]


def find_slice(part: str, users: str | None, arms: str | None, config: Config, is_toy: bool) -> Slice:
    """Return a slice with its cells chosen. Raises ConfigError for an unknown slice or arm."""
    known = (*WITH_OWN_ARMS, *grid.SLICES)
    if part not in known:
        raise ConfigError(f"--slice has value '{part}'; choose one of {', '.join(known)}")
    if part in grid.SLICES:
        objective = config.training.objective
        return _make_slice(grid, grid.choose_cells(part, users, arms, config.seed), objective)
    if arms is not None:
        raise ConfigError(f"option --arms has value '{arms}', and --slice {part} has its own arms; leave --arms out")
    if part == "few":
        return _make_slice(few_figures, few_figures.choose_cells(few_figures.choose_size(is_toy), users, config.seed))
    return _make_slice(hacking, hacking.choose_cells(users, config.seed))


def _make_slice(module: Any, cells: list[Any], *described_by: str) -> Slice:
    def run(config: Config, base_model: str, kept: Path, progress: Progress) -> Any:
        return module.run_cells(config, base_model, cells, kept, progress)

    return Slice(run, lambda found: module.compute_figures(found, *described_by), module.plot)
