"""Lineage: which versions come from which base model, and which of them may take another's place.

It knows versions and the files of models, and no database.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from bot.fingerprint import fingerprint_model
from bot.types import PolicyState, PolicyVersion

LIVE_BEFORE = "live when the base model was changed"  # a key of a base version's metrics: the name of a version


def is_same_base(base: PolicyVersion, model: str, weights: str) -> bool:
    """Return whether a base version is of this model, perhaps at another place: of the same weights where both are known.

    `weights` is the fingerprint of the model. Hub models, whose weights are elsewhere, go by their whole name, and
    directories that are gone by their own.
    """
    known = base.sha256 or fingerprint_model(base.base_model)
    if known and weights:
        return known == weights
    are_places = Path(base.base_model).is_absolute() or Path(model).is_absolute()
    return Path(base.base_model).name == Path(model).name if are_places else base.base_model == model


def find_bases(versions: Sequence[PolicyVersion]) -> dict[str, PolicyVersion]:
    """Return the base version that each of all versions (oldest first) comes from, by the name of the version."""
    bases: dict[str, PolicyVersion] = {}
    for version in versions:  # parents come before their children
        bases[version.name] = version if version.parent is None else bases[version.parent]
    return bases


def servable_before(
    live: PolicyVersion, versions: Sequence[PolicyVersion], barred: Collection[str] = ()
) -> PolicyVersion | None:
    """Return the version to go back to: the newest that was live before and may serve again; None before the first.

    What was purged since, is `barred` or comes from another base model is passed by. If no other is left it is the base.
    """
    by_name = {version.name: version for version in versions}
    bases = find_bases(versions)
    passed = {live.name}  # a version that was promoted twice may have replaced its own successor
    name = live.replaced
    while name is not None and name not in passed:
        passed.add(name)
        version = by_name[name]
        is_ours = bases[name] is bases[live.name]
        if version.state == PolicyState.RETIRED and is_ours and name not in barred:
            return version
        name = version.replaced
    return None if live.is_base else bases[live.name]


def last_live(base: PolicyVersion, versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """Return what was live when a base model was set aside; where that was purged since, the newest before it."""
    last = next((version for version in versions if version.name == base.metrics.get(LIVE_BEFORE)), base)
    return last if last.state == PolicyState.RETIRED else servable_before(last, versions) or base
