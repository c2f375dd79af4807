"""Lineage: which versions come from which base model, where that is, and which of them may take another's place.

It knows versions and the files of models, and no database.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from bot.errors import RegistryError
from bot.store.fingerprint import fingerprint_model
from bot.types import PolicyState, PolicyVersion


def is_same_base(base: PolicyVersion, model: str, weights: str) -> bool:
    """Return whether a base version is of this model, perhaps at another place: of the same weights where both are known.

    `weights` is the fingerprint of the model. Where one has none (a hub model's weights are elsewhere, a directory may be
    gone), both must have the same name, with all of its path.
    """
    known = base.sha256 or fingerprint_model(base.base_model)
    return known == weights if known and weights else base.base_model == model


def check_same_base(base: PolicyVersion, model: str, weights: str) -> None:
    """Raise RegistryError where a base version is of another model."""
    if not is_same_base(base, model, weights):
        raise RegistryError(
            f"the model is '{model}', but this data directory's versions come from '{base.base_model}'; set "
            "policy.model (or --model) back, use another --data-dir, or change the model with `kibitz serve`"
        )


def relocate_base(base: PolicyVersion, versions: Sequence[PolicyVersion], model: str, weights: str) -> list[PolicyVersion]:
    """Return the versions that change where the weights of a base are at `model` now: it and all that come from it.

    A fingerprint that is known stays so where the files of the model cannot be read.
    """
    moved = replace(base, base_model=model, path=model, sha256=weights or base.sha256)
    bases = find_bases(versions)
    ours = [one for one in versions if bases[one.name].name == base.name and not one.is_base]
    changed = [] if moved == base else [moved]
    return changed + [replace(one, base_model=model) for one in ours if one.base_model != model]


def find_bases(versions: Sequence[PolicyVersion]) -> dict[str, PolicyVersion]:
    """Return the base version that each of all versions (oldest first) comes from, by the name of the version."""
    bases: dict[str, PolicyVersion] = {}
    for version in versions:  # parents come before their children
        bases[version.name] = version if version.parent is None else bases[version.parent]
    return bases


def find_rollback_target(
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


def find_last_live(base: PolicyVersion, versions: Sequence[PolicyVersion]) -> PolicyVersion:
    """Return what was live when a base model was set aside; where that was purged since, the newest before it."""
    last = next((version for version in versions if version.name == base.metrics.live_before), base)
    return last if last.state == PolicyState.RETIRED else find_rollback_target(last, versions) or base
