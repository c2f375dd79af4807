"""Manifest: everything that a version's weights depend on. It is written last, so a version with a manifest is complete."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import Field

from bot.records import Record

FILE = "manifest.json"


class Row(NamedTuple):
    """An experience in a manifest: its turn, the hash of its token ids, its figures and its feedback."""

    turn_id: str
    ids_sha256: str
    reward: float
    advantage: float
    weight: float
    feedback_ids: list[str]


class Manifest(Record):
    """The base model, parent, settings, trained and held-out rows of a run, and the count of rows left out by reason.

    If a reward head labelled the policy's own answers, `head_rows` are those that it was fitted to, and `distil_prompts` is
    how many prompts were answered in a round, at most; `unjudged` are the turns whose questions were answered though nobody
    judged their answers. `own_answers` is how many answers of the policy, and of its base, each correction was preferred to;
    it is 0 without corrections. `sha256` is the hash of the rest. A manifest has no time, path or version number, so equal
    runs have equal manifests.
    """

    base_sha256: str = ""
    parent_sha256: str = ""
    training: dict[str, Any] = Field(default_factory=dict)  # the section of the config at that time
    rewards: dict[str, Any] = Field(default_factory=dict)
    embedder: str = ""
    seed: int = 0
    since: str = ""  # the first turn whose feedback counts; "" for all
    rows: list[Row] = Field(default_factory=list)
    held_out: list[Row] = Field(default_factory=list)
    head_rows: list[Row] = Field(default_factory=list)
    distil_prompts: int = 0
    unjudged: list[str] = Field(default_factory=list)
    own_answers: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    sha256: str = ""

    def sign(self) -> Self:
        """Return the manifest with its hash."""
        content = json.dumps(self.as_json(), sort_keys=True)
        return self.model_copy(update={"sha256": hashlib.sha256(content.encode()).hexdigest()})

    def write(self, directory: Path) -> None:
        """Write the manifest into a version's directory."""
        (directory / FILE).write_text(json.dumps(self.as_json(), indent=1, sort_keys=True))


def read_manifest(directory: Path) -> Manifest | None:
    """Read the manifest of a version. Return None if its files are gone, or if it is a base model."""
    file = directory / FILE
    return Manifest.from_json(json.loads(file.read_text())) if file.is_file() else None


def read_since(directory: Path) -> str:
    """Read the first turn whose feedback counts for a version: the last detected change of opinions, or "" for all."""
    manifest = read_manifest(directory)
    return "" if manifest is None else manifest.since
