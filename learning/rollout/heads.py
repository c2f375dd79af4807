"""Heads: the files of reward heads, `heads/head-HASH.json` in the data directory.

A file never changes. Its name is the hash of its content. Turns name the head that chose their answer. All files are deleted
when anything is forgotten (`bot.store.forgetting`); the next one is fitted to what is left.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bot.errors import DataError
from bot.output_files import write_text
from bot.store.forgetting import HEADS_DIRECTORY
from learning.data.feature_space import FeatureSpace
from learning.judging.reward_head import RewardHead
from learning.judging.taught_head import TaughtHead

KEPT = 16  # newest files; turns keep what older heads did with them


@dataclass(frozen=True)
class HeadFile:
    """A head in a file: its name, when it was written, how many people taught it, and its highest e-value."""

    name: str
    written_at: datetime
    teachers: int
    e_value: float


def locate_heads(data: Path) -> Path:
    """Return the directory of heads in a data directory."""
    return data / HEADS_DIRECTORY


def save_head(head: TaughtHead, directory: Path) -> None:
    """Write a head to its file, and delete the oldest files. Raises DataError if it cannot be written.

    If something is forgotten meanwhile, the head is not written.
    """
    with contextlib.suppress(OSError):  # `write_text` says what is wrong
        directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{head.name}.json"
    if not file.exists():
        try:
            write_text(file, json.dumps(head.as_json()))
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # forgetting removes unfinished files too
                raise
    for old in _list_files(directory)[KEPT:]:
        old.unlink(missing_ok=True)


def read_head(file: Path) -> TaughtHead:
    """Read a head from its file. Raises DataError if the file is damaged."""
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        parts = RewardHead.from_json(values["head"]), FeatureSpace.from_json(values["space"])
        own = {person: RewardHead.from_json(one) for person, one in values.get("own", {}).items()}
        found = TaughtHead(*parts, tuple(values["teachers"]), float(values["peak_e_value"]), own)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{file}: is no reward head ({type(error).__name__}); delete it, a new one is fitted") from error
    if found.name != file.stem:
        raise DataError(f"{file}: was changed after it was written; delete it, a new one is fitted")
    return found


def list_heads(directory: Path) -> Iterator[HeadFile | DataError]:
    """Yield the heads in a directory, newest first; for a damaged file its error."""
    for file in _list_files(directory):
        try:
            head = read_head(file)
            written = datetime.fromtimestamp(file.stat().st_mtime, UTC)
            yield HeadFile(head.name, written, len(head.teachers), head.peak_e_value)
        except DataError as error:
            yield error


def _list_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("head-*.json"), key=lambda file: (-file.stat().st_mtime_ns, file.name))
