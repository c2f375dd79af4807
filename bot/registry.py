"""PolicyRegistry: the policy versions and their life cycle, and the tables that hold them.

A version is immutable: its name and its directory are never used again (vLLM keys its prefix cache by adapter name). The
live version is the one row in state LIVE; promoting is one transaction. It knows no torch and no server, so that a
rollback works while training is broken.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bot.database import Database
from bot.errors import RegistryError
from bot.fingerprint import fingerprint_model
from bot.tables import chunks, policies, run_feedback, run_followups, runs, switches
from bot.types import PolicyState, PolicyVersion, new_id, now

S = PolicyState
TRANSITIONS: dict[PolicyState, set[PolicyState]] = {
    S.TRAINING: {S.CANDIDATE, S.REJECTED, S.PURGED},
    S.CANDIDATE: {S.CANARY, S.LIVE, S.REJECTED, S.PURGED},
    S.CANARY: {S.LIVE, S.REJECTED, S.PURGED},
    S.LIVE: {S.RETIRED},
    S.RETIRED: {S.LIVE, S.PURGED},
    S.REJECTED: {S.PURGED},
    S.PURGED: set(),
}

BASE = "policy-0"  # the first base model; each that takes its place has a name of its own
LEARNING_PAUSED = "learning paused"  # the name of a switch
_BASES = sa.select(policies).where(policies.c.parent.is_(None)).order_by(policies.c.number.desc())  # the one in use first


class PolicyRegistry:
    """All versions of the policy, the live one, and the runs that made them."""

    def __init__(self, database: Database):
        self.database = database

    def ensure_base(self, base_model: str, may_change: bool = False) -> PolicyVersion:
        """Return the version that is the base model itself, live from the start; made now if there is none.

        Where the versions come from another base model, it is refused unless it `may_change`: then the new one goes live
        under a name of its own, and nothing that was trained on the other serves again. What people said stays.
        """
        weights = fingerprint_model(base_model)
        with self.database.begin() as connection:
            row = connection.execute(_BASES).first()
            if row is None:
                version = PolicyVersion(BASE, None, base_model, base_model, S.LIVE, sha256=weights)
                connection.execute(policies.insert().values(number=0, **asdict(version)))
                return version
            found = _version(row)
            if _is_same_base(found, base_model, weights):
                if found.sha256 != weights:  # made before fingerprints were kept, or of a model that was not here
                    connection.execute(policies.update().where(policies.c.name == found.name).values(sha256=weights))
                return replace(found, sha256=weights)
            if not may_change:
                raise RegistryError(
                    f"the model is '{base_model}', but this data directory's versions come from '{found.base_model}'; set "
                    "policy.model (or --model) back, or use another --data-dir"
                )
            for version in map(_version, connection.execute(sa.select(policies)).all()):
                if version.state == S.LIVE:
                    _move(connection, version.name, S.RETIRED)
                elif version.state in (S.CANDIDATE, S.CANARY):
                    outcome = {"outcome": "the base model was changed"}
                    _move(connection, version.name, S.REJECTED, metrics=version.metrics | outcome)
            number = _next_number(connection)
            version = PolicyVersion(f"policy-{number}", None, base_model, base_model, S.LIVE, sha256=weights)
            connection.execute(policies.insert().values(number=number, **asdict(version)))
        return version

    def base(self) -> PolicyVersion:
        """Return the base model's own version: the newest, where the base model was changed."""
        with self.database.read() as connection:
            return _base(connection)

    def foreign(self) -> set[str]:
        """Return the names of versions that come from an earlier base model."""
        versions = self.all()
        bases = [version for version in versions if version.is_base]
        foreign = {one.name for one in bases if not _is_same_base(one, bases[-1].base_model, bases[-1].sha256)}
        for version in versions:  # parents come before their children
            if version.parent in foreign:
                foreign.add(version.name)
        return foreign

    def reserve(self, parent: PolicyVersion, policies_dir: Path) -> PolicyVersion:
        """A new version in state TRAINING, with a name and a directory that were never used before."""
        with self.database.begin() as connection:
            number = _next_number(connection)
            name = f"policy-{number}"
            path = str((policies_dir / name).absolute())
            version = PolicyVersion(name, parent.name, parent.base_model, path, S.TRAINING)
            connection.execute(policies.insert().values(number=number, **asdict(version)))
        return version

    def complete(self, name: str, sha256: str, metrics: dict[str, Any]) -> PolicyVersion:
        """The version's files are whole: it is a candidate from now on."""
        return self.move(name, S.CANDIDATE, sha256=sha256, metrics=metrics)

    def reject(self, name: str, metrics: dict[str, Any] | None = None) -> PolicyVersion:
        """The version will never serve."""
        return self.move(name, S.REJECTED, **({} if metrics is None else {"metrics": metrics}))

    def promote(self, name: str, metrics: dict[str, Any] | None = None) -> PolicyVersion:
        """Make a version live, with other metrics where they are given, and retire the one that was, in one transaction."""
        with self.database.begin() as connection:
            before = _live(connection)
            _move(connection, before.name, S.RETIRED)
            return _move(connection, name, S.LIVE, replaced=before.name, **({} if metrics is None else {"metrics": metrics}))

    def rollback(self) -> tuple[PolicyVersion, PolicyVersion]:
        """Take the live version back; returns it and the one that serves again."""
        with self.database.begin() as connection:
            live = _live(connection)
            if live.replaced is None:
                raise RegistryError(f"{live.name} is live and has replaced nothing: there is no version to go back to")
            _move(connection, live.name, S.RETIRED)
            return replace(live, state=S.RETIRED), _move(connection, live.replaced, S.LIVE)

    def purge(
        self, connection: sa.Connection, feedback_ids: Iterable[str], followup_ids: Iterable[str] = ()
    ) -> list[PolicyVersion]:
        """Withdraw every version that this feedback, or these messages that followed up, taught, and all that were trained
        on from those; returns them.

        Where the live one is among them, the newest version before it that is clean answers again. In the transaction of
        `connection`; their files are for the caller to remove.
        """
        taught = _taught(connection, feedback_ids, followup_ids)
        versions = [_version(row) for row in connection.execute(sa.select(policies).order_by(policies.c.number))]
        for version in versions:  # parents come before their children
            if version.parent in taught:
                taught.add(version.name)
        by_name = {version.name: version for version in versions}
        clean = live = _live(connection)
        while clean.name in taught:
            clean = by_name[clean.replaced or _base(connection).name]
        if clean is not live:
            _move(connection, live.name, S.RETIRED)
            _move(connection, clean.name, S.LIVE)
        gone = [by_name[name] for name in sorted(taught) if by_name[name].state != S.PURGED]
        return [_move(connection, version.name, S.PURGED) for version in gone]

    def pause_learning(self) -> bool:
        """Pause the training of new versions, or go on with it where it was paused; True if it is paused now."""
        switch = switches.c.name == LEARNING_PAUSED
        with self.database.begin() as connection:
            if connection.execute(switches.delete().where(switch)).rowcount:
                return False
            connection.execute(switches.insert().values(name=LEARNING_PAUSED, since=now()))
        return True

    def learning_is_paused(self) -> bool:
        """Whether an operator paused the training of new versions."""
        with self.database.read() as connection:
            query = sa.select(switches.c.name).where(switches.c.name == LEARNING_PAUSED)
            return connection.execute(query).first() is not None

    def move(self, name: str, state: PolicyState, **changes: Any) -> PolicyVersion:
        """One transition of the table above, with other columns changed along."""
        with self.database.begin() as connection:
            return _move(connection, name, state, **changes)

    def live(self) -> PolicyVersion:
        """The version that answers."""
        return self._one(policies.c.state == S.LIVE)

    def get(self, name: str) -> PolicyVersion:
        """One version by its name."""
        return self._one(policies.c.name == name)

    def all(self) -> list[PolicyVersion]:
        """Every version there ever was, oldest first."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(policies).order_by(policies.c.number)).all()
        return [_version(row) for row in rows]

    def abandon_unfinished(self) -> list[str]:
        """Reject what a dead process left in training; returns the names."""
        stale = [version.name for version in self.all() if version.state == S.TRAINING]
        for name in stale:
            self.reject(name, {"outcome": "the run did not end"})
        return stale

    def begin_run(
        self,
        policy: str,
        config: dict[str, Any],
        manifest_sha256: str,
        feedback: Sequence[str],
        followups: Sequence[str] = (),
    ) -> str:
        """Record a run with the feedback, and the messages that followed up, that it learns from; returns its id."""
        run_id = new_id()
        with self.database.begin() as connection:
            connection.execute(
                runs.insert().values(
                    id=run_id,
                    policy=policy,
                    config=config,
                    manifest_sha256=manifest_sha256,
                    outcome="training",
                    started_at=now(),
                )
            )
            for column, teachers in ((run_feedback.c.feedback_id, feedback), (run_followups.c.message_id, followups)):
                rows = [{"run_id": run_id, column.name: one} for one in sorted(set(teachers))]
                if rows:
                    connection.execute(column.table.insert(), rows)
        return run_id

    def end_run(self, run_id: str, outcome: str) -> None:
        """Record how a run ended."""
        with self.database.begin() as connection:
            connection.execute(runs.update().where(runs.c.id == run_id).values(outcome=outcome, ended_at=now()))

    def runs(self) -> list[dict[str, Any]]:
        """Every run with its policy, outcome, times and how much feedback taught it, oldest first."""
        taught = sa.select(sa.func.count()).where(run_feedback.c.run_id == runs.c.id).scalar_subquery()
        query = sa.select(
            runs.c.policy, runs.c.outcome, runs.c.manifest_sha256, runs.c.started_at, runs.c.ended_at, taught.label("n")
        ).order_by(runs.c.started_at, runs.c.id)
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def taught(self) -> set[str]:
        """The feedback that ever taught a version."""
        with self.database.read() as connection:
            return set(connection.execute(sa.select(run_feedback.c.feedback_id).distinct()).scalars())

    def runs_that_used(self, feedback_ids: Sequence[str], followup_ids: Sequence[str] = ()) -> list[str]:
        """The names of the versions that this feedback, or these messages that followed up, taught."""
        with self.database.read() as connection:
            return sorted(_taught(connection, feedback_ids, followup_ids))

    def _one(self, condition: sa.ColumnElement[bool]) -> PolicyVersion:
        with self.database.read() as connection:
            row = connection.execute(sa.select(policies).where(condition)).one_or_none()
        if row is None:
            raise RegistryError("there is no such policy version; `kibitz policies` lists them all")
        return _version(row)


def _taught(connection: sa.Connection, feedback_ids: Iterable[str], followup_ids: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for column, teachers in ((run_feedback.c.feedback_id, feedback_ids), (run_followups.c.message_id, followup_ids)):
        query = sa.select(runs.c.policy).join(column.table, column.table.c.run_id == runs.c.id)
        for ids in chunks(teachers):
            found.update(connection.execute(query.where(column.in_(ids))).scalars())
    return found


def _is_same_base(base: PolicyVersion, model: str, weights: str) -> bool:
    """Return whether a base version is of this model, perhaps at another place: of the same weights where both are known.

    Hub models, whose weights are elsewhere, go by their whole name, and directories that are gone by their own.
    """
    known = base.sha256 or fingerprint_model(base.base_model)
    if known and weights:
        return known == weights
    are_places = Path(base.base_model).is_absolute() or Path(model).is_absolute()
    return Path(base.base_model).name == Path(model).name if are_places else base.base_model == model


def _next_number(connection: sa.Connection) -> int:
    return connection.execute(sa.select(sa.func.max(policies.c.number))).scalar_one() + 1


def _base(connection: sa.Connection) -> PolicyVersion:
    row = connection.execute(_BASES).first()
    if row is None:
        raise RegistryError("there is no version yet: this data directory was never served")
    return _version(row)


def _live(connection: sa.Connection) -> PolicyVersion:
    row = connection.execute(sa.select(policies).where(policies.c.state == S.LIVE)).one_or_none()
    if row is None:
        raise RegistryError("no version is live yet: this data directory was never served; `kibitz policies` lists them all")
    return _version(row)


def _move(connection: sa.Connection, name: str, state: PolicyState, **changes: Any) -> PolicyVersion:
    row = connection.execute(sa.select(policies).where(policies.c.name == name)).one_or_none()
    if row is None:
        raise RegistryError(f"there is no policy version '{name}'; `kibitz policies` lists them all")
    found = _version(row)
    if state not in TRANSITIONS[found.state]:
        allowed = ", ".join(sorted(TRANSITIONS[found.state])) or "nothing"
        raise RegistryError(f"{name} is {found.state} and cannot become {state}; from there it may become {allowed}")
    connection.execute(policies.update().where(policies.c.name == name).values(state=state, **changes))
    return replace(found, state=state, **changes)


def _version(row: Any) -> PolicyVersion:
    values = {name: getattr(row, name) for name in PolicyVersion.__dataclass_fields__}
    return PolicyVersion(**{**values, "state": PolicyState(values["state"])})
