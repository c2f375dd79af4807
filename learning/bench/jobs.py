"""Jobs: run the cells of a benchmark in processes of their own, and keep those that are finished.

An interrupted benchmark continues with the cells that are left.
"""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from bot.config import Config
from bot.serving.children import worker_pool
from bot.types import Progress


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class Cell(Hashable, Dataclass, Protocol):
    """One cell of a benchmark: a frozen dataclass."""

    def describe(self) -> str:
        """Describe the cell to people who wait for it."""


C = TypeVar("C", bound=Cell)
P = TypeVar("P", bound=Dataclass)


def run_cells(
    run: Callable[[Config, str, C], list[P]],
    make_point: Callable[..., P],
    config: Config,
    base_model: str,
    wanted: Sequence[C],
    kept: Path,
    progress: Progress,
) -> dict[C, list[P]]:
    """Run cells, each in a process of its own, and return the points of each.

    Cells in the file `kept` are not run again. Their points are made by `make_point`. The file is deleted when all are done.
    """
    mark = hash_settings(config, base_model)
    names = {json.dumps(asdict(cell)): cell for cell in wanted}
    rows_of = {names[name]: rows for name, rows in read_kept_rows(kept, mark) if name in names}
    found = {cell: [make_point(**row) for row in rows] for cell, rows in rows_of.items()}
    left = [cell for cell in wanted if cell not in found]
    kept.parent.mkdir(parents=True, exist_ok=True)
    progress("learning", len(found), len(wanted))
    if left:
        with worker_pool(min(len(left), os.cpu_count() or 1)) as pool, kept.open("a") as file:
            jobs = {pool.submit(run, config, base_model, cell): cell for cell in left}
            for job in as_completed(jobs):
                cell = jobs[job]
                found[cell] = job.result()
                rows = [asdict(point) for point in found[cell]]
                file.write(json.dumps({"mark": mark, "cell": asdict(cell), "points": rows}) + "\n")
                file.flush()
                progress(f"learning: {cell.describe()}", len(found), len(wanted))
    kept.unlink(missing_ok=True)
    return {cell: found[cell] for cell in wanted}


def hash_settings(config: Config, base_model: str) -> str:
    """Return a hash of the settings that a cell is run with (16 hex digits)."""
    return hashlib.sha256(json.dumps([config.model_dump(), base_model], sort_keys=True).encode()).hexdigest()[:16]


def read_kept_rows(file: Path, mark: str) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """Read the cells (as JSON) and the rows of their points that an interrupted run with these settings left in a file."""
    if not file.is_file():
        return
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the interruption cut this line
            continue
        if row["mark"] == mark:
            yield json.dumps(row["cell"]), row["points"]
