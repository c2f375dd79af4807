"""Versions: the rows of all policy versions, within one transaction.

The database has no paths of trained versions, because a data directory may be moved, copied or mounted elsewhere. Their
files are in the directory that kibitz runs on, each version's in a folder with its name.
"""

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bot.errors import RegistryError
from bot.store.lineage import find_bases, find_rollback_target, relocate_base
from bot.store.tables import policies
from bot.types import Metrics, PolicyState, PolicyVersion

S = PolicyState
TRANSITIONS: dict[PolicyState, set[PolicyState]] = {
    S.TRAINING: {S.CANDIDATE, S.REJECTED, S.PURGED},
    S.CANDIDATE: {S.WAITING, S.CANARY, S.LIVE, S.REJECTED, S.PURGED},
    S.WAITING: {S.WAITING, S.CANDIDATE, S.REJECTED, S.PURGED},
    S.CANARY: {S.LIVE, S.REJECTED, S.PURGED},
    S.LIVE: {S.RETIRED},
    S.RETIRED: {S.LIVE, S.PURGED},
    S.REJECTED: {S.PURGED},
    S.PURGED: set(),
}


class Versions:
    """All versions, in the transaction of `connection`. `directory` has the folders of trained versions."""

    def __init__(self, connection: sa.Connection, directory: Path):
        self.connection, self.directory = connection, directory

    def select(self, query: sa.Select[Any]) -> list[PolicyVersion]:
        """Return the versions of a query on the table `policies`."""
        return [self._make(row) for row in self.connection.execute(query)]

    def read_all(self) -> list[PolicyVersion]:
        """Return every version, oldest first."""
        return self.select(sa.select(policies).order_by(policies.c.number))

    def read(self, name: str) -> PolicyVersion:
        """Return a version by its name. Raises RegistryError if there is none."""
        found = self.select(sa.select(policies).where(policies.c.name == name))
        if not found:
            raise RegistryError(f"there is no policy version '{name}'; `kibitz policies` lists them all")
        return found[0]

    def read_live(self) -> PolicyVersion:
        """Return the live version. Raises RegistryError if there is none."""
        found = self.select(sa.select(policies).where(policies.c.state == S.LIVE))
        if not found:
            count = self.connection.execute(sa.select(sa.func.count()).select_from(policies)).scalar_one()
            raise RegistryError(
                f"no version is live, of {count} recorded; `kibitz policies` lists them; the first start of "
                "kibitz makes the base model live"
            )
        return found[0]

    def read_base(self) -> PolicyVersion:
        """Return the base of the live version. Raises RegistryError if no version is live."""
        live = self.read_live()
        return find_bases(self.read_all())[live.name]

    def find_next_number(self) -> int:
        """Return the number of the next version, which is above all others."""
        return self.connection.execute(sa.select(sa.func.max(policies.c.number))).scalar_one() + 1

    def add(self, number: int, parent: str | None, base_model: str, state: PolicyState, sha256: str = "") -> PolicyVersion:
        """Add a version, named by its number, and return it. A version without `parent` is a base model."""
        name = f"policy-{number}"
        version = PolicyVersion(name, parent, base_model, self._locate(name, parent, base_model), state, sha256=sha256)
        values = asdict(version)
        del values["path"]
        self.connection.execute(policies.insert().values(number=number, **values))
        return version

    def move(self, name: str, state: PolicyState, **changes: Any) -> PolicyVersion:
        """Move a version to another state, and change other columns too. Raises RegistryError if TRANSITIONS forbids it."""
        found = self.read(name)
        if state not in TRANSITIONS[found.state]:
            allowed = ", ".join(sorted(TRANSITIONS[found.state])) or "nothing"
            raise RegistryError(f"{name} is {found.state} and cannot become {state}; it may become {allowed}")
        self.connection.execute(policies.update().where(policies.c.name == name).values(state=state, **changes))
        return replace(found, state=state, **changes)

    def purge(self, names: Collection[str]) -> list[PolicyVersion]:
        """Purge these versions. Return those that were not purged before.

        If the live version is among them, the newest before it that may serve becomes live.
        """
        versions = self.read_all()
        live = next((version for version in versions if version.state == S.LIVE), None)
        if live is not None and live.name in names:
            back = find_rollback_target(live, versions, barred=names)
            if back is None:
                raise RegistryError(f"{live.name} is the base model itself and cannot be withdrawn")
            self.move(live.name, S.RETIRED)
            self.move(back.name, S.LIVE)
        gone = [version.name for version in versions if version.name in names and version.state != S.PURGED]
        return [self.move(name, S.PURGED) for name in gone]

    def set_aside(self, base: PolicyVersion) -> list[PolicyVersion]:
        """Retire the live version of a base model that is replaced, and reject its candidates. Return those."""
        rejected = []
        for version in self.read_all():
            if version.state == S.LIVE:
                self.move(version.name, S.RETIRED)
                metrics = base.metrics | Metrics(live_before=version.name)
                self.connection.execute(policies.update().where(policies.c.name == base.name).values(metrics=metrics))
            elif version.state in (S.CANDIDATE, S.WAITING, S.CANARY):
                metrics = version.metrics | Metrics(outcome="the base model was changed")
                rejected.append(self.move(version.name, S.REJECTED, metrics=metrics))
        return rejected

    def relocate_base(self, base: PolicyVersion, model: str, weights: str) -> PolicyVersion:
        """Record the current path of a base's weights, and return the base."""
        versions = self.read_all()
        current = next(version for version in versions if version.name == base.name)
        for one in relocate_base(current, versions, model, weights):
            place = {"base_model": one.base_model, "sha256": one.sha256}
            self.connection.execute(policies.update().where(policies.c.name == one.name).values(place))
        return self.read(base.name)

    def _locate(self, name: str, parent: str | None, base_model: str) -> str:
        return base_model if parent is None else str(self.directory / name)

    def _make(self, row: Any) -> PolicyVersion:
        stored = row._mapping
        values = {name: stored[name] for name in PolicyVersion.__dataclass_fields__ if name in stored}
        values["path"] = self._locate(stored["name"], stored["parent"], stored["base_model"])
        return PolicyVersion(**{**values, "state": PolicyState(stored["state"])})
