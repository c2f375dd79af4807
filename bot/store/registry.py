"""PolicyRegistry: the policy versions, their life cycle, and the runs that made them.

A version is immutable. Its name and directory are never used again, because vLLM keys its prefix cache by adapter name. Only
the path of its base model may change, if the weights are the same (`bot.store.lineage.relocate_base`). The live version is
the one row in state LIVE, and promoting is one transaction. It does not depend on torch or on a server, so that a rollback
works while training is broken.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from bot.errors import RegistryError, VerdictOutdated
from bot.store.database import Database
from bot.store.fingerprint import fingerprint_model
from bot.store.lineage import check_same_base, find_bases, find_last_live, find_rollback_target, is_same_base, relocate_base
from bot.store.sources import find_people_behind
from bot.store.tables import policies, run_feedback, run_followups, run_teachers, runs, switches
from bot.types import Metrics, Person, PolicyState, PolicyVersion, new_id, now

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

MAY_SERVE = {S.CANDIDATE, S.WAITING, S.CANARY, S.LIVE, S.RETIRED}
BASE = "policy-0"  # the first base model; later ones have names of their own
LEARNING_PAUSED = "learning paused"  # the name of a switch
DEPLOY_PREFIX = "deploy "  # the name of a switch is this with a version's name
_BASES = sa.select(policies).where(policies.c.parent.is_(None)).order_by(policies.c.number.desc())  # the newest first
_WITHOUT_METRICS = sa.select(*(column for column in policies.c if column.name != "metrics")).order_by(policies.c.number)


class PolicyRegistry:
    """All versions of the policy, the live one, and the runs that made them."""

    def __init__(self, database: Database):
        self.database = database

    def check_base(self, base_model: str) -> None:
        """Raise RegistryError if the versions of this data directory come from another base model."""
        weights = fingerprint_model(base_model)
        with self.database.read() as connection:
            if connection.execute(_BASES).first() is not None:
                check_same_base(_read_base(connection), base_model, weights)

    def ensure_base(self, base_model: str) -> PolicyVersion:
        """As `set_base`, but raise RegistryError if the versions come from another base model."""
        with self.database.begin():
            self.check_base(base_model)
            return self.set_base(base_model)

    def set_base(self, base_model: str) -> PolicyVersion:
        """Make a model the base of new versions, and return its version. The first one is live from the start.

        If the versions come from another base model, the new model goes live under a name of its own, and nothing that was
        trained on the other serves until that model comes back. A model that comes back has its old name, and the version
        that was live when it was replaced is live again. Conversations and feedback stay. A model with the same weights at
        another path is recorded there, with all versions that come from it.
        """
        weights = fingerprint_model(base_model)
        with self.database.begin() as connection:
            bases = [_as_version(row) for row in connection.execute(_BASES)]
            if bases:
                current = _read_base(connection)
                if is_same_base(current, base_model, weights):
                    return _relocate_base(connection, current, base_model, weights)
                _set_aside(connection, current)
            back = next((base for base in bases if is_same_base(base, base_model, weights)), None)
            if back is not None:
                _move(connection, find_last_live(back, _read_all(connection)).name, S.LIVE)
                return _relocate_base(connection, back, base_model, weights)
            number = _find_next_number(connection) if bases else 0  # BASE, even if later names were used
            version = PolicyVersion(f"policy-{number}", None, base_model, base_model, S.LIVE, sha256=weights)
            connection.execute(policies.insert().values(number=number, **asdict(version)))
        return version

    def get_base(self) -> PolicyVersion:
        """Return the version of the base model that the live version comes from."""
        with self.database.read() as connection:
            return _read_base(connection)

    def find_foreign(self) -> set[str]:
        """Return the names of versions that come from another base model than the live one."""
        with self.database.read() as connection:
            versions = [_as_version(row) for row in connection.execute(_WITHOUT_METRICS)]
        if not versions:
            return set()
        bases = find_bases(versions)
        ours = bases[next(version.name for version in versions if version.state == S.LIVE)]
        return {name for name, base in bases.items() if base is not ours}

    def reserve(self, parent: PolicyVersion, policies_dir: Path) -> PolicyVersion:
        """Create a version in state TRAINING, with a name and a directory that were never used before."""
        with self.database.begin() as connection:
            number = _find_next_number(connection)
            name = f"policy-{number}"
            path = str((policies_dir / name).absolute())
            version = PolicyVersion(name, parent.name, parent.base_model, path, S.TRAINING)
            connection.execute(policies.insert().values(number=number, **asdict(version)))
        return version

    def complete(self, name: str, sha256: str, metrics: Metrics) -> PolicyVersion:
        """Make a version whose files are complete a candidate."""
        return self.move(name, S.CANDIDATE, sha256=sha256, metrics=metrics)

    def reject(self, name: str, metrics: Metrics | None = None) -> PolicyVersion:
        """Reject a version. It will never serve."""
        return self.move(name, S.REJECTED, **({} if metrics is None else {"metrics": metrics}))

    def find_waiting(self) -> list[PolicyVersion]:
        """Return the versions that wait for evidence, oldest first."""
        with self.database.read() as connection:
            query = sa.select(policies).where(policies.c.state == S.WAITING).order_by(policies.c.number)
            return [_as_version(row) for row in connection.execute(query)]

    def record_verdict(self, name: str, state: PolicyState, metrics: Metrics, outcome: str) -> PolicyVersion:
        """Move a waiting version to `state` (candidate, rejected, or waiting again), and set its run's outcome."""
        with self.database.begin() as connection:
            connection.execute(runs.update().where(runs.c.policy == name).values(outcome=outcome))
            return _move(connection, name, state, metrics=metrics)

    def request_deployment(self, name: str) -> None:
        """Ask the running kibitz, or the next one that starts, to deploy a candidate, or a waiting version once it is one.

        Raises RegistryError if the version is in another state.
        """
        with self.database.begin() as connection:
            state = self.get(name).state
            if state not in (S.CANDIDATE, S.WAITING):
                raise RegistryError(f"{name} is {state}: only a candidate can be deployed; `kibitz policies` lists them")
            wanted = DEPLOY_PREFIX + name
            if connection.execute(sa.select(switches.c.name).where(switches.c.name == wanted)).first() is None:
                connection.execute(switches.insert().values(name=wanted, since=now()))

    def find_requested(self) -> list[PolicyVersion]:
        """Return the candidates whose deployment was requested, oldest first."""
        asked = sa.literal(DEPLOY_PREFIX) + policies.c.name == switches.c.name
        query = sa.select(policies).join(switches, asked).where(policies.c.state == S.CANDIDATE)
        with self.database.read() as connection:
            return [_as_version(row) for row in connection.execute(query.order_by(policies.c.number))]

    def promote(self, name: str, metrics: Metrics | None = None, instead_of: str | None = None) -> PolicyVersion:
        """Make a version live and retire the live one, in one transaction. `metrics` replace the version's if given.

        Raises VerdictOutdated if `instead_of` is given but not live.
        """
        with self.database.begin() as connection:
            before = _read_live(connection)
            if instead_of is not None and before.name != instead_of:
                raise VerdictOutdated(name, instead_of, before.name)
            _move(connection, before.name, S.RETIRED)
            return _move(connection, name, S.LIVE, replaced=before.name, **({} if metrics is None else {"metrics": metrics}))

    def roll_back(self) -> tuple[PolicyVersion, PolicyVersion]:
        """Retire the live version and make the newest before it that may serve live. Return both."""
        with self.database.begin() as connection:
            live = _read_live(connection)
            back = find_rollback_target(live, _read_all(connection))
            if back is None:
                others = [version for version in _read_all(connection) if version.is_base and version.name != live.name]
                raise RegistryError(
                    f"{live.name} is live and has replaced nothing, so there is no version to go back to"
                    + (f"; to have {others[-1].base_model} back, set policy.model and start kibitz again" if others else "")
                )
            return _move(connection, live.name, S.RETIRED), _move(connection, back.name, S.LIVE)

    def purge_taught(self, connection: sa.Connection, person: Person, until: datetime | None = None) -> list[PolicyVersion]:
        """Purge every version that a person taught (`until` a time), and all trained from those. Return them.

        The records of who taught them are deleted for this person. This runs in the transaction of `connection`. The caller
        removes the versions' files.
        """
        theirs = (run_teachers.c.platform == person[0]) & (run_teachers.c.user_id == person[1])
        if until is not None:
            theirs &= run_teachers.c.run_id.in_(sa.select(runs.c.id).where(runs.c.started_at <= until))
        query = sa.select(runs.c.policy).join(run_teachers, run_teachers.c.run_id == runs.c.id).where(theirs)
        taught = set(connection.execute(query).scalars())
        for version in _read_all(connection):  # parents come before their children
            if version.parent in taught:
                taught.add(version.name)
        connection.execute(run_teachers.delete().where(theirs))
        return purge_versions(connection, taught)

    def reconcile_directory(self, policies_dir: Path, used: Collection[str]) -> list[str]:
        """Match the versions of a restored database to a directory. Return the names of the versions that were withdrawn.

        A version without files never serves again. Names that were `used` since the backup are never used again.
        """
        with self.database.begin() as connection:
            for version in _read_all(connection):
                if not version.is_base:
                    path = str((policies_dir / version.name).absolute())
                    connection.execute(policies.update().where(policies.c.name == version.name).values(path=path))
            known = _read_all(connection)
            missing = {version.name for version in known if not version.is_base and not Path(version.path).is_dir()}
            gone = {version.name for version in known if version.name in missing and version.state in MAY_SERVE}
            withdrawn = [version.name for version in purge_versions(connection, gone)]
            base_model = next((version.base_model for version in reversed(known) if version.is_base), "")
            for name in sorted(set(used) - {BASE} - {version.name for version in known}):
                number = name.removeprefix("policy-")
                if not number.isdecimal():
                    continue  # not a name of ours
                path = str((policies_dir / name).absolute())
                version = PolicyVersion(name, BASE, base_model, path, S.PURGED)
                connection.execute(policies.insert().values(number=int(number), **asdict(version)))
                withdrawn.append(name)
        return withdrawn

    def toggle_learning(self) -> bool:
        """Pause the training of new versions, or resume it if it is paused. Return whether it is paused now."""
        switch = switches.c.name == LEARNING_PAUSED
        with self.database.begin() as connection:
            if connection.execute(switches.delete().where(switch)).rowcount:
                return False
            connection.execute(switches.insert().values(name=LEARNING_PAUSED, since=now()))
        return True

    def is_learning_paused(self) -> bool:
        """Return whether an operator paused the training of new versions."""
        with self.database.read() as connection:
            query = sa.select(switches.c.name).where(switches.c.name == LEARNING_PAUSED)
            return connection.execute(query).first() is not None

    def move(self, name: str, state: PolicyState, **changes: Any) -> PolicyVersion:
        """Move a version to another state, and change other columns too. Raises RegistryError if TRANSITIONS forbids it."""
        with self.database.begin() as connection:
            return _move(connection, name, state, **changes)

    def get_live(self) -> PolicyVersion:
        """Return the live version."""
        return self._read_one(policies.c.state == S.LIVE)

    def get(self, name: str) -> PolicyVersion:
        """Return a version by its name. Raises RegistryError if there is none."""
        return self._read_one(policies.c.name == name)

    def all(self) -> list[PolicyVersion]:
        """Return every version, oldest first."""
        with self.database.read() as connection:
            return _read_all(connection)

    def find_directories(self, state: PolicyState | None = None) -> dict[str, str]:
        """Return the directory of each version (or of those in one `state`), by name, oldest first."""
        query = _WITHOUT_METRICS if state is None else _WITHOUT_METRICS.where(policies.c.state == state)
        with self.database.read() as connection:
            return {row.name: row.path for row in connection.execute(query)}

    def count(self, state: PolicyState) -> int:
        """Return how many versions are in a state."""
        query = sa.select(sa.func.count()).select_from(policies).where(policies.c.state == state)
        with self.database.read() as connection:
            return connection.execute(query).scalar_one()

    def reject_unfinished(self) -> list[str]:
        """Reject the versions that a dead process left in TRAINING. Return their names."""
        stale = [version.name for version in self.all() if version.state == S.TRAINING]
        for name in stale:
            self.reject(name, Metrics(outcome="the run did not end"))
        return stale

    def begin_run(
        self,
        policy: str,
        config: dict[str, Any],
        manifest_sha256: str,
        feedback: Sequence[str],
        followups: Sequence[str] = (),
    ) -> str:
        """Record a run with the feedback and the follow-up messages that it learns from. Return its id.

        Its teachers are recorded too, to outlive their messages. Raises RegistryError if any data was deleted meanwhile.
        """
        run_id = new_id()
        with self.database.read() as connection:  # takes long, so it must not hold the write lock
            people = find_people_behind(connection, feedback, followups)
        run = {"id": run_id, "policy": policy, "config": config, "manifest_sha256": manifest_sha256}
        try:
            with self.database.begin() as connection:
                connection.execute(runs.insert(), run | {"outcome": "training", "started_at": now()})
                for table, rows in (
                    (run_feedback, [{"feedback_id": one} for one in sorted(set(feedback))]),
                    (run_followups, [{"message_id": one} for one in sorted(set(followups))]),
                    (run_teachers, [{"platform": platform, "user_id": user} for platform, user in sorted(people)]),
                ):
                    if rows:
                        connection.execute(table.insert(), [{"run_id": run_id, **row} for row in rows])
        except IntegrityError as error:
            raise RegistryError(
                f"some training data of {policy} was deleted meanwhile; the next run learns from the rest"
            ) from error
        return run_id

    def end_run(self, run_id: str, outcome: str) -> None:
        """Record the outcome of a run."""
        with self.database.begin() as connection:
            connection.execute(runs.update().where(runs.c.id == run_id).values(outcome=outcome, ended_at=now()))

    def list_runs(self) -> list[dict[str, Any]]:
        """Return every run with its policy, outcome, times and the number `n` of feedback acts, oldest first."""
        taught = sa.select(sa.func.count()).where(run_feedback.c.run_id == runs.c.id).scalar_subquery()
        query = sa.select(
            runs.c.policy, runs.c.outcome, runs.c.manifest_sha256, runs.c.started_at, runs.c.ended_at, taught.label("n")
        ).order_by(runs.c.started_at, runs.c.id)
        with self.database.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def _read_one(self, condition: sa.ColumnElement[bool]) -> PolicyVersion:
        with self.database.read() as connection:
            row = connection.execute(sa.select(policies).where(condition)).one_or_none()
        if row is None:
            raise RegistryError("there is no such policy version; `kibitz policies` lists them all")
        return _as_version(row)


def purge_versions(connection: sa.Connection, names: Collection[str]) -> list[PolicyVersion]:
    """Purge these versions. Return those that were not purged before.

    If the live version is among them, the newest before it that may serve becomes live.
    """
    versions = _read_all(connection)
    live = next((version for version in versions if version.state == S.LIVE), None)
    if live is not None and live.name in names:
        back = find_rollback_target(live, versions, barred=names)
        if back is None:
            raise RegistryError(f"{live.name} is the base model itself and cannot be withdrawn")
        _move(connection, live.name, S.RETIRED)
        _move(connection, back.name, S.LIVE)
    gone = [version.name for version in versions if version.name in names and version.state != S.PURGED]
    return [_move(connection, name, S.PURGED) for name in gone]


def _find_next_number(connection: sa.Connection) -> int:
    return connection.execute(sa.select(sa.func.max(policies.c.number))).scalar_one() + 1


def _read_all(connection: sa.Connection) -> list[PolicyVersion]:
    return [_as_version(row) for row in connection.execute(sa.select(policies).order_by(policies.c.number))]


def _read_base(connection: sa.Connection) -> PolicyVersion:
    return find_bases(_read_all(connection))[_read_live(connection).name]


def _relocate_base(connection: sa.Connection, base: PolicyVersion, model: str, weights: str) -> PolicyVersion:
    """Record the current path of a base's weights, and return the base."""
    versions = _read_all(connection)
    current = next(version for version in versions if version.name == base.name)
    for one in relocate_base(current, versions, model, weights):
        place = {"base_model": one.base_model, "path": one.path, "sha256": one.sha256}
        connection.execute(policies.update().where(policies.c.name == one.name).values(place))
    return replace(current, base_model=model, path=model, sha256=weights or current.sha256)


def _set_aside(connection: sa.Connection, base: PolicyVersion) -> None:
    """Retire the live version of a base model that is replaced, and reject its candidates."""
    for version in _read_all(connection):
        if version.state == S.LIVE:
            _move(connection, version.name, S.RETIRED)
            metrics = base.metrics | Metrics(live_before=version.name)
            connection.execute(policies.update().where(policies.c.name == base.name).values(metrics=metrics))
        elif version.state in (S.CANDIDATE, S.WAITING, S.CANARY):
            metrics = version.metrics | Metrics(outcome="the base model was changed")
            _move(connection, version.name, S.REJECTED, metrics=metrics)


def _read_live(connection: sa.Connection) -> PolicyVersion:
    row = connection.execute(sa.select(policies).where(policies.c.state == S.LIVE)).one_or_none()
    if row is None:
        raise RegistryError("no version is live: this data directory was never served; `kibitz policies` lists them all")
    return _as_version(row)


def _move(connection: sa.Connection, name: str, state: PolicyState, **changes: Any) -> PolicyVersion:
    row = connection.execute(sa.select(policies).where(policies.c.name == name)).one_or_none()
    if row is None:
        raise RegistryError(f"there is no policy version '{name}'; `kibitz policies` lists them all")
    found = _as_version(row)
    if state not in TRANSITIONS[found.state]:
        allowed = ", ".join(sorted(TRANSITIONS[found.state])) or "nothing"
        raise RegistryError(f"{name} is {found.state} and cannot become {state}; it may become {allowed}")
    connection.execute(policies.update().where(policies.c.name == name).values(state=state, **changes))
    return replace(found, state=state, **changes)


def _as_version(row: Any) -> PolicyVersion:
    values = {name: row._mapping[name] for name in PolicyVersion.__dataclass_fields__ if name in row._mapping}
    return PolicyVersion(**{**values, "state": PolicyState(values["state"])})
