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


class Cell(Hashable, Protocol):
    """One cell of a benchmark: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def describe(self) -> str:
        """Describe the cell to people who wait for it."""


C = TypeVar("C", bound=Cell)
Rows = list[dict[str, Any]]


def run_cells(
    run: Callable[[Config, str, C], Rows],
    config: Config,
    base_model: str,
    wanted: Sequence[C],
    kept: Path,
    progress: Progress,
) -> dict[C, Rows]:
    """Run cells and return the rows of each. Cells in the file `kept` are not run again; it is deleted when all are done."""
    mark = hash_settings(config, base_model)
    names = {json.dumps(asdict(cell)): cell for cell in wanted}
    found = {names[name]: rows for name, rows in read_kept_rows(kept, mark) if name in names}
    left = [cell for cell in wanted if cell not in found]
    kept.parent.mkdir(parents=True, exist_ok=True)
    progress("learning", len(found), len(wanted))
    if left:
        with worker_pool(min(len(left), os.cpu_count() or 1)) as pool, kept.open("a") as file:
            jobs = {pool.submit(run, config, base_model, cell): cell for cell in left}
            for job in as_completed(jobs):
                cell = jobs[job]
                found[cell] = job.result()
                file.write(json.dumps({"mark": mark, "cell": asdict(cell), "points": found[cell]}) + "\n")
                file.flush()
                progress(f"learning: {cell.describe()}", len(found), len(wanted))
    kept.unlink(missing_ok=True)
    return {cell: found[cell] for cell in wanted}


def hash_settings(config: Config, base_model: str) -> str:
    """Return a hash of the settings that a cell is run with (16 hex digits)."""
    return hashlib.sha256(json.dumps([config.model_dump(), base_model], sort_keys=True).encode()).hexdigest()[:16]


def read_kept_rows(file: Path, mark: str) -> Iterable[tuple[str, Rows]]:
    """Read the cells (as JSON) and their rows that an interrupted run with these settings left in a file."""
    if not file.is_file():
        return
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the interruption cut this line
            continue
        if row["mark"] == mark:
            yield json.dumps(row["cell"]), row["points"]
