"""Lineage of versions: their base models, the places of these, and the version to roll back to.

It does not depend on the database.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from bot.errors import RegistryError
from bot.store.fingerprint import fingerprint_model
from bot.types import PolicyState, PolicyVersion


def is_same_base(base: PolicyVersion, model: str, weights: str) -> bool:
    """Return whether a base version is this model, perhaps at another path, by comparing their weights.

    `weights` is the fingerprint of the model. If either has no fingerprint (a hub model, or a directory that is gone), both
    must have the same full name or path.
    """
    known = base.sha256 or fingerprint_model(base.base_model)
    return known == weights if known and weights else base.base_model == model


def check_same_base(base: PolicyVersion, model: str, weights: str) -> None:
    """Raise RegistryError if a base version is another model."""
    if not is_same_base(base, model, weights):
        raise RegistryError(
            f"the model is '{model}', but this data directory's versions come from '{base.base_model}'; set "
            "policy.model (or --model) back, use another --data-dir, or change the model with `kibitz serve`"
        )


def relocate_base(base: PolicyVersion, versions: Sequence[PolicyVersion], model: str, weights: str) -> list[PolicyVersion]:
    """Return the versions that change if the weights of `base` are at `model` now: the base and its descendants.

    A known fingerprint is kept if the model's files cannot be read.
    """
    moved = replace(base, base_model=model, path=model, sha256=weights or base.sha256)
    bases = find_bases(versions)
    ours = [one for one in versions if bases[one.name].name == base.name and not one.is_base]
    changed = [] if moved == base else [moved]
    return changed + [replace(one, base_model=model) for one in ours if one.base_model != model]


def find_bases(versions: Sequence[PolicyVersion]) -> dict[str, PolicyVersion]:
    """Return the base of each version, by the version's name. `versions` are all versions, oldest first."""
    bases: dict[str, PolicyVersion] = {}
    for version in versions:  # parents come before their children
        bases[version.name] = version if version.parent is None else bases[version.parent]
    return bases


def find_rollback_target(
    live: PolicyVersion, versions: Sequence[PolicyVersion], barred: Collection[str] = ()
) -> PolicyVersion | None:
    """Return the version to roll back to: the newest that was live before and may serve again, or None before the first.

    Versions that were purged, are `barred`, or come from another base model are skipped. If none is left it is the base.
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


def find_last_live(base: PolicyVersion, versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """Return the version that was live when a base model was replaced or, if it was purged since, the newest before it."""
    last = next((version for version in versions if version.name == base.metrics.live_before), base)
    return last if last.state == PolicyState.RETIRED else find_rollback_target(last, versions) or base
