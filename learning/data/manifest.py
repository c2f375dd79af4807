"""Manifest: all that the weights of a version depend on, in its directory. No version is whole without it: it comes last."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field

from bot.types import Record

FILE = "manifest.json"


class Row(NamedTuple):
    """An experience: the turn, the hash of its token ids, and what it was worth, which all its feedback said together."""

    turn_id: str
    ids_sha256: str
    reward: float
    advantage: float
    weight: float
    feedback_ids: list[str]


class Manifest(Record):
    """The base model and the parent that a run went on from, its settings, the rows that it learned from and those that it
    held out, and why others were left out. `sha256` is the hash of all that. There is no time, path or version number in it.
    """

    base_sha256: str = ""
    parent_sha256: str = ""
    training: dict[str, Any] = Field(default_factory=dict)  # a section of the config as it was then
    rewards: dict[str, Any] = Field(default_factory=dict)
    embedder: str = ""
    seed: int = 0
    since: str = ""  # the turn from which on what was said counts; "" for all
    rows: list[Row] = Field(default_factory=list)
    held_out: list[Row] = Field(default_factory=list)
    dropped: dict[str, int] = Field(default_factory=dict)
    sha256: str = ""

    def sign(self) -> Self:
        """Return it with its hash."""
        content = json.dumps(self.as_json(), sort_keys=True)
        return self.model_copy(update={"sha256": hashlib.sha256(content.encode()).hexdigest()})

    def write(self, directory: Path) -> None:
        """Write it into a version's directory."""
        (directory / FILE).write_text(json.dumps(self.as_json(), indent=1, sort_keys=True))


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a version; None where its files are gone, or it is a base model."""
    file = directory / FILE
    return Manifest.from_json(json.loads(file.read_text())) if file.is_file() else None


def read_since(directory: Path) -> str:
    """Read the turn from which on what was said counts for a version: where people came to want the opposite, if ever."""
    manifest = read_manifest(directory)
    return "" if manifest is None else manifest.since
