"""PolicyRegistry: the policy versions, their life cycle, and the runs that made them.

A version is immutable. Its name and directory are never used again, because vLLM keys its prefix cache by adapter name. Only
the path of its base model may change, if the weights are the same (`bot.store.lineage.relocate_base`). The live version is
the one row in state LIVE, and promoting is one transaction. It does not depend on torch or on a server, so that a rollback
works while training is broken.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from bot.errors import RegistryError, VerdictOutdated
from bot.store.database import Database
from bot.store.fingerprint import fingerprint_model
from bot.store.lineage import check_same_base, find_bases, find_last_live, find_rollback_target, is_same_base
from bot.store.sources import find_people_behind, hold_turns
from bot.store.tables import policies, run_feedback, run_followups, run_teachers, runs, switches
from bot.store.versions import Versions
from bot.store.weights import discard_weights
from bot.types import Metrics, Person, PolicyState, PolicyVersion, new_id, now

S = PolicyState
MAY_SERVE = {S.CANDIDATE, S.WAITING, S.CANARY, S.LIVE, S.RETIRED}
BASE = "policy-0"  # the first base model; later ones have names of their own
LEARNING_PAUSED = "learning paused"  # the name of a switch
DELETED = "some training data of {} was deleted meanwhile; the next run learns from the rest"
DEPLOY_PREFIX = "deploy "  # the name of a switch is this with a version's name
_BASES = sa.select(policies).where(policies.c.parent.is_(None)).order_by(policies.c.number.desc())  # the newest first
_WITHOUT_METRICS = sa.select(*(column for column in policies.c if column.name != "metrics")).order_by(policies.c.number)


class PolicyRegistry:
    """All versions of the policy, the live one, and the runs that made them.

    The files of trained versions are below `directory`, which is in the database's directory.
    """

    def __init__(self, database: Database):
        if database.directory is None:
            raise ValueError("the versions of a database without a directory have no place for their files")
        self.database = database
        self.directory = (database.directory / "policies").absolute()

    def check_base(self, base_model: str) -> None:
        """Raise RegistryError if the versions of this data directory come from another base model."""
        weights = fingerprint_model(base_model)
        with self._read() as versions:
            _check_base(versions, base_model, weights)

    def ensure_base(self, base_model: str) -> PolicyVersion:
        """As `set_base`, but raise RegistryError if the versions come from another base model."""
        weights = fingerprint_model(base_model)
        with self._begin() as versions:
            _check_base(versions, base_model, weights)
            return self._set_base(versions, base_model, weights)

    def set_base(self, base_model: str) -> PolicyVersion:
        """Make a model the base of new versions, and return its version. The first one is live from the start.

        If the versions come from another base model, the new model goes live under a name of its own, and nothing that was
        trained on the other serves until that model comes back. A model that comes back has its old name, and the version
        that was live when it was replaced is live again. Conversations and feedback stay. A model with the same weights at
        another path is recorded there, with all versions that come from it.
        """
        weights = fingerprint_model(base_model)
        with self._begin() as versions:
            return self._set_base(versions, base_model, weights)

    def get_base(self) -> PolicyVersion:
        """Return the version of the base model that the live version comes from."""
        with self._read() as versions:
            return versions.read_base()

    def find_foreign(self) -> set[str]:
        """Return the names of versions that come from another base model than the live one."""
        with self._read() as versions:
            known = versions.select(_WITHOUT_METRICS)
        live = next((version.name for version in known if version.state == S.LIVE), None)
        if live is None:
            return set()
        bases = find_bases(known)
        ours = bases[live]
        return {name for name, base in bases.items() if base is not ours}

    def reserve(self, parent: PolicyVersion) -> PolicyVersion:
        """Create a version in state TRAINING, with a name and a directory that were never used before."""
        with self._begin() as versions:
            return versions.add(versions.find_next_number(), parent.name, parent.base_model, S.TRAINING)

    def complete(self, name: str, sha256: str, metrics: Metrics) -> PolicyVersion:
        """Make a version whose files are complete a candidate."""
        return self.move(name, S.CANDIDATE, sha256=sha256, metrics=metrics)

    def reject(self, name: str, metrics: Metrics | None = None) -> PolicyVersion:
        """Reject a version. It will never serve."""
        return self.move(name, S.REJECTED, **({} if metrics is None else {"metrics": metrics}))

    def find_waiting(self) -> list[PolicyVersion]:
        """Return the versions that wait for evidence, oldest first."""
        with self._read() as versions:
            return versions.select(sa.select(policies).where(policies.c.state == S.WAITING).order_by(policies.c.number))

    def record_verdict(self, name: str, state: PolicyState, metrics: Metrics, outcome: str) -> PolicyVersion:
        """Move a waiting version to `state` (candidate, rejected, or waiting again), and set its run's outcome."""
        with self._begin() as versions:
            versions.connection.execute(runs.update().where(runs.c.policy == name).values(outcome=outcome))
            return versions.move(name, state, metrics=metrics)

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
        with self._read() as versions:
            return versions.select(query.order_by(policies.c.number))

    def promote(self, name: str, metrics: Metrics | None = None, instead_of: str | None = None) -> PolicyVersion:
        """Make a version live and retire the live one, in one transaction. `metrics` replace the version's if given.

        Raises VerdictOutdated if `instead_of` is given but not live.
        """
        with self._begin() as versions:
            before = versions.read_live()
            if instead_of is not None and before.name != instead_of:
                raise VerdictOutdated(name, instead_of, before.name)
            versions.move(before.name, S.RETIRED)
            return versions.move(name, S.LIVE, replaced=before.name, **({} if metrics is None else {"metrics": metrics}))

    def roll_back(self) -> tuple[PolicyVersion, PolicyVersion]:
        """Retire the live version and make the newest before it that may serve live. Return both."""
        with self._begin() as versions:
            live = versions.read_live()
            back = find_rollback_target(live, versions.read_all())
            if back is None:
                others = [version for version in versions.read_all() if version.is_base and version.name != live.name]
                raise RegistryError(
                    f"{live.name} is live and has replaced nothing, so there is no version to go back to"
                    + (f"; to have {others[-1].base_model} back, set policy.model and start kibitz again" if others else "")
                )
            return versions.move(live.name, S.RETIRED), versions.move(back.name, S.LIVE)

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
        versions = Versions(connection, self.directory)
        for version in versions.read_all():  # parents come before their children
            if version.parent in taught:
                taught.add(version.name)
        connection.execute(run_teachers.delete().where(theirs))
        return versions.purge(taught)

    def reconcile_directory(self, used: Collection[str]) -> list[str]:
        """Match the versions of a restored database to the directory. Return the names of the versions that were withdrawn.

        A version without files never serves again. Names that were `used` since the backup are never used again. If the
        backup has no base model yet, their parent is the one that the first start adds.
        """
        with self._begin() as versions:
            known = versions.read_all()
            missing = {version.name for version in known if not version.is_base and not Path(version.path).is_dir()}
            gone = {version.name for version in known if version.name in missing and version.state in MAY_SERVE}
            withdrawn = [version.name for version in versions.purge(gone)]
            parent, base_model = next(((one.name, one.base_model) for one in reversed(known) if one.is_base), (BASE, ""))
            for name in sorted(set(used) - {BASE} - {version.name for version in known}):
                number = name.removeprefix("policy-")
                if number.isdecimal() and name == f"policy-{int(number)}":  # otherwise it is not ours
                    withdrawn.append(versions.add(int(number), parent, base_model, S.PURGED).name)
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
        with self._begin() as versions:
            return versions.move(name, state, **changes)

    def get_live(self) -> PolicyVersion:
        """Return the live version. Raises RegistryError if there is none."""
        with self._read() as versions:
            return versions.read_live()

    def get(self, name: str) -> PolicyVersion:
        """Return a version by its name. Raises RegistryError if there is none."""
        with self._read() as versions:
            return versions.read(name)

    def all(self) -> list[PolicyVersion]:
        """Return every version, oldest first."""
        with self._read() as versions:
            return versions.read_all()

    def get_newest(self) -> PolicyVersion:
        """Return the version that was made last. Raises RegistryError if there is none."""
        with self._read() as versions:
            found = versions.select(sa.select(policies).order_by(policies.c.number.desc()).limit(1))
        if not found:
            raise RegistryError("there is no policy version yet")
        return found[0]

    def find_directories(self, state: PolicyState | None = None) -> dict[str, str]:
        """Return the directory of each version (or of those in one `state`), by name, oldest first."""
        query = _WITHOUT_METRICS if state is None else _WITHOUT_METRICS.where(policies.c.state == state)
        with self._read() as versions:
            return {version.name: version.path for version in versions.select(query)}

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
        asked: Sequence[str] = (),
    ) -> str:
        """Record a run with the feedback and the follow-up messages that it learns from, and the turns whose questions it
        `asked` again. Return its id.

        Its teachers are recorded too, to outlive their messages. Raises RegistryError if any data was deleted meanwhile.
        """
        run_id = new_id()
        with self.database.read() as connection:  # takes long, so it must not hold the write lock
            people = find_people_behind(connection, feedback, followups, asked)
        run = {"id": run_id, "policy": policy, "config": config, "manifest_sha256": manifest_sha256}
        try:
            with self.database.begin() as connection:
                connection.execute(runs.insert(), run | {"outcome": "training", "started_at": now()})
                if hold_turns(connection, asked) != set(asked):
                    raise RegistryError(DELETED.format(policy))
                for table, rows in (
                    (run_feedback, [{"feedback_id": one} for one in sorted(set(feedback))]),
                    (run_followups, [{"message_id": one} for one in sorted(set(followups))]),
                    (run_teachers, [{"platform": platform, "user_id": user} for platform, user in sorted(people)]),
                ):
                    if rows:
                        connection.execute(table.insert(), [{"run_id": run_id, **row} for row in rows])
        except IntegrityError as error:
            raise RegistryError(DELETED.format(policy)) from error
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

    def _set_base(self, versions: Versions, base_model: str, weights: str) -> PolicyVersion:
        bases = versions.select(_BASES)
        if bases:
            current = versions.read_base()
            if is_same_base(current, base_model, weights):
                return versions.relocate_base(current, base_model, weights)
            for rejected in versions.set_aside(current):
                self.database.run_after_commit(partial(discard_weights, Path(rejected.path)))
        back = next((base for base in bases if is_same_base(base, base_model, weights)), None)
        if back is not None:
            versions.move(find_last_live(back, versions.read_all()).name, S.LIVE)
            return versions.relocate_base(back, base_model, weights)
        number = versions.find_next_number() if bases else 0  # BASE, even if later names were used
        return versions.add(number, None, base_model, S.LIVE, weights)

    @contextmanager
    def _read(self) -> Iterator[Versions]:
        with self.database.read() as connection:
            yield Versions(connection, self.directory)

    @contextmanager
    def _begin(self) -> Iterator[Versions]:
        with self.database.begin() as connection:
            yield Versions(connection, self.directory)


def _check_base(versions: Versions, base_model: str, weights: str) -> None:
    if versions.select(_BASES):
        check_same_base(versions.read_base(), base_model, weights)
