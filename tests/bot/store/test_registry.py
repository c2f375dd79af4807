"""Policy versions: immutable, never reused, and one of them live."""

import shutil
from collections.abc import AsyncIterator
from contextlib import closing
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import sqlalchemy as sa
from conftest import answered, migrate, react
from safetensors.numpy import save_file

from bot.config import Config
from bot.errors import RegistryError, VerdictOutdated
from bot.serving.policy import Policy
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.fingerprint import fingerprint_model
from bot.store.forgetting import forget_person
from bot.store.registry import BASE, PolicyRegistry
from bot.store.tables import policies
from bot.store.versions import TRANSITIONS, Versions
from bot.store.weights import ADAPTER_FILES
from bot.types import Metrics, PolicyState
from learning.rollout.deployment import Deployment
from learning.rollout.loop import OnlineLearner


def candidate(registry, tmp_path, parent=BASE):
    version = registry.reserve(registry.get(parent))
    return registry.complete(version.name, "hash", Metrics(kl=0.1))


def test_version_0_is_the_base_and_live_from_the_start(registry, demo_model):
    assert registry.get_live().name == BASE
    assert registry.ensure_base(demo_model).path == demo_model


def test_another_base_model_on_the_same_data_directory_is_refused(registry):
    with pytest.raises(RegistryError, match=r"set policy\.model \(or --model\) back"):
        registry.ensure_base("/models/another")


def test_a_changed_base_model_goes_live_under_a_name_of_its_own_and_nothing_of_the_old_one_serves_again(
    registry, demo_model, tmp_path
):
    live = candidate(registry, tmp_path)
    registry.promote(live.name)
    waiting = candidate(registry, tmp_path)
    assert registry.find_foreign() == set()
    base = registry.set_base("/models/another")
    assert (base.name, base.is_base, base.state) == ("policy-3", True, PolicyState.LIVE)
    assert registry.get_base() == registry.get_live() == base
    assert registry.find_foreign() == {BASE, live.name, waiting.name}
    assert registry.get(live.name).state == PolicyState.RETIRED
    assert registry.get(waiting.name).metrics.outcome == "the base model was changed"
    with pytest.raises(RegistryError, match="no version to go back to"):
        registry.roll_back()
    version = registry.reserve(registry.get_live())
    assert (version.name, version.base_model) == ("policy-4", "/models/another")
    with pytest.raises(RegistryError, match="versions come from"):  # nobody can tell whether they are the same
        registry.ensure_base("/elsewhere/another")
    assert registry.set_base("/models/third").name == "policy-5", "a name is never used again"


def test_a_base_model_that_comes_back_has_its_name_and_what_was_live_of_it(registry, database, demo_model, tmp_path):
    one, two, three = (candidate(registry, tmp_path) for _ in range(3))
    for version in (one, two, three):
        registry.promote(version.name)
    registry.roll_back()
    for other in ("/models/another", "/models/third", "/models/another"):
        registry.set_base(other)
        assert registry.get_live().base_model == registry.get_base().base_model == other
    assert registry.get_base().name == "policy-4", "under its first name"
    with pytest.raises(RegistryError, match=r"set policy\.model and start kibitz again"):
        registry.roll_back()
    back = registry.set_base(demo_model)
    assert (back.name, back.state, registry.get_base()) == (BASE, PolicyState.RETIRED, back)
    assert registry.get_live().name == two.name, "not the newest, which was taken back"
    assert registry.find_foreign() == {"policy-4", "policy-5"}
    assert registry.reserve(registry.get_live()).base_model == demo_model
    registry.set_base("/models/third")
    with database.begin() as connection:
        Versions(connection, registry.directory).purge({two.name})
    registry.set_base(demo_model)
    assert registry.get_live().name == one.name, "what was purged meanwhile is passed by"
    assert registry.roll_back()[1].name == BASE


def with_weights(version):
    for name in ADAPTER_FILES:
        file = Path(version.path) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("weights")
    (Path(version.path) / "metrics.json").write_text("what the report reads")
    return version


def files(version):
    return {path.name for path in Path(version.path).iterdir()}


def test_the_weights_of_candidates_go_with_their_base_model_once_the_change_is_committed(registry, database, tmp_path):
    live, candidate_, waiting = (with_weights(candidate(registry, tmp_path)) for _ in range(3))
    registry.promote(live.name)
    registry.move(waiting.name, PolicyState.WAITING)
    with pytest.raises(KeyError), database.begin():
        registry.set_base("/models/another")
        raise KeyError("this transaction fails")
    everything = {*ADAPTER_FILES, "metrics.json"}
    assert files(candidate_) == files(waiting) == everything
    registry.set_base("/models/another")
    assert files(candidate_) == files(waiting) == {"metrics.json"}
    assert files(live) == everything, "it is live again when its base model comes back"


def test_the_path_of_a_version_follows_from_the_directory_of_the_database(config, registry, database, demo_model, tmp_path):
    version = candidate(registry, tmp_path)
    assert Path(version.path) == config.data / "policies" / version.name
    with closing(Database(config.database_url, tmp_path / "elsewhere")) as moved:
        found = PolicyRegistry(moved)
        assert Path(found.get(version.name).path) == tmp_path / "elsewhere" / "policies" / version.name
        assert found.find_directories() == {one.name: one.path for one in found.all()}
        assert found.get(BASE).path == demo_model, "a base model is where it is"


def test_versions_of_an_older_kibitz_are_found_without_the_paths_that_it_stored(registry, database, demo_model, tmp_path):
    version = candidate(registry, tmp_path)
    migrate(database, "0012")
    stored = sa.table("policies", sa.column("path"), sa.column("parent"))
    with database.begin() as connection:
        assert connection.execute(sa.select(stored.c.path).where(stored.c.parent.is_(None))).scalar_one() == demo_model
        connection.execute(stored.update().where(stored.c.parent.is_not(None)).values(path="/where/it/was"))
    database.upgrade()
    assert registry.get(version.name) == version
    assert registry.get_live().path == demo_model


def test_a_database_without_a_directory_has_no_registry():
    with (
        closing(Database("postgresql+psycopg://127.0.0.1:1/kibitz")) as database,
        pytest.raises(ValueError, match="no place"),
    ):
        PolicyRegistry(database)


def test_the_error_for_a_missing_version_names_it_and_that_for_no_live_one_says_so(database):
    registry = PolicyRegistry(database)
    with pytest.raises(RegistryError, match=r"there is no policy version 'policy-7'"):
        registry.get("policy-7")
    with pytest.raises(RegistryError, match=r"no version is live, of 0 recorded"):
        registry.get_live()
    assert registry.find_foreign() == set()


def test_whether_the_base_model_is_another_one_is_asked_without_changing_anything(registry, demo_model):
    registry.check_base(demo_model)
    with pytest.raises(RegistryError, match=r"or change the model with `kibitz serve`"):
        registry.check_base("/models/another")
    assert [version.name for version in registry.all()] == [BASE]


def weights(directory, value):
    directory.mkdir(parents=True)
    save_file({"one": np.zeros(9, np.float32), "two": np.full((3, 2), value, np.float32)}, directory / "model.safetensors")
    return str(directory)


def test_models_are_told_apart_by_their_weights_and_not_by_the_name_of_their_directory(database, tmp_path):
    registry = PolicyRegistry(database)
    one = weights(tmp_path / "one" / "final", 1.0)
    base = registry.ensure_base(one)
    assert registry.ensure_base(weights(tmp_path / "moved" / "elsewhere", 1.0)).name == base.name, "the same, elsewhere"
    version = candidate(registry, tmp_path)
    other = weights(tmp_path / "two" / "final", 2.0)
    with pytest.raises(RegistryError, match=r"versions come from"):
        registry.ensure_base(other)
    assert registry.set_base(other).name == "policy-2"
    assert registry.find_foreign() == {base.name, version.name}
    shutil.rmtree(tmp_path / "two")
    with pytest.raises(RegistryError, match=r"versions come from"):  # other weights at the same place
        registry.ensure_base(weights(tmp_path / "two" / "final", 3.0))


def test_a_base_model_from_before_fingerprints_were_kept_is_known_again(database, tmp_path):
    registry = PolicyRegistry(database)
    one, other = weights(tmp_path / "one" / "final", 1.0), weights(tmp_path / "two" / "final", 2.0)
    registry.ensure_base(one)
    with database.begin() as connection:
        connection.execute(policies.update().values(sha256=""))
    with pytest.raises(RegistryError, match=r"versions come from"):
        registry.ensure_base(other)
    assert registry.ensure_base(one).sha256 == registry.get(BASE).sha256 != ""


def places(registry):
    return {version.name: version.base_model for version in registry.all()}


def test_a_base_model_that_moved_is_where_it_is_now_for_itself_and_for_all_that_come_from_it(database, tmp_path):
    registry = PolicyRegistry(database)
    one = weights(tmp_path / "one", 1.0)
    registry.ensure_base(one)
    trained = candidate(registry, tmp_path)
    trained = candidate(registry, tmp_path, registry.promote(trained.name).name)
    shutil.move(one, tmp_path / "two")
    two = str(tmp_path / "two")
    registry.check_base(two)
    assert set(places(registry).values()) == {one}, "who only looks writes nothing"
    base = registry.ensure_base(two)
    assert (base.base_model, base.path, base) == (two, two, registry.get_base())
    assert places(registry) == dict.fromkeys([BASE, "policy-1", "policy-2"], two)
    assert registry.get(trained.name).path == trained.path, "its own weights stay where they are"
    shutil.rmtree(two)
    assert registry.ensure_base(two).sha256 == base.sha256 == registry.get_base().sha256, (
        "what cannot be read is not forgotten"
    )


def test_a_base_model_that_comes_back_from_another_place_is_there_and_what_took_its_place_stays(database, tmp_path):
    registry = PolicyRegistry(database)
    one = weights(tmp_path / "one", 1.0)
    registry.ensure_base(one)
    trained = candidate(registry, tmp_path)
    registry.promote(trained.name)
    shutil.rmtree(one)
    weights(tmp_path / "one", 2.0)  # in place
    assert registry.set_base(one).name == "policy-2"
    two = weights(tmp_path / "two", 1.0)
    back = registry.set_base(two)
    assert (back.name, back.path, registry.get_live().name) == (BASE, two, trained.name)
    assert places(registry) == {BASE: two, "policy-1": two, "policy-2": one}
    assert fingerprint_model(registry.get_live().base_model) == registry.get_base().sha256


@pytest.mark.parametrize("archive", [True, False], ids=["an archive", "a pickle of older days"])
def test_models_that_torch_saved_are_told_apart_by_their_weights(database, tmp_path, archive):
    import torch

    def saved(place, value):
        place.mkdir(parents=True)
        tensors = {"one": torch.zeros(20_000), "two": torch.full((3, 2), value)}
        torch.save(tensors, place / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
        return str(place)

    registry = PolicyRegistry(database)
    one = saved(tmp_path / "one" / "final", 1.0)
    assert registry.ensure_base(one).sha256 == fingerprint_model(one) != ""
    with pytest.raises(RegistryError, match=r"versions come from"):
        registry.ensure_base(saved(tmp_path / "two" / "final", 2.0))
    elsewhere = str(shutil.copytree(one, tmp_path / "elsewhere"))
    assert registry.ensure_base(elsewhere).base_model == elsewhere


def test_a_fingerprint_is_the_same_in_every_version_of_kibitz(tmp_path):
    """Otherwise each data directory that there is would take its own base model for another one."""
    known = "37e253af1c0c5515db6404f94fae552ccbf0e8fb203d4081bbf670dd85bed8e2"
    assert fingerprint_model(weights(tmp_path / "model", 1.0)) == known


def test_hub_models_are_told_apart_by_their_whole_names(database):
    registry = PolicyRegistry(database)
    assert registry.ensure_base("somebody/llama").sha256 == ""
    assert registry.ensure_base("somebody/llama").name == BASE
    with pytest.raises(RegistryError, match=r"versions come from"):
        registry.ensure_base("somebody-else/llama")
    with pytest.raises(RegistryError, match=r"versions come from"):  # a copy of it, perhaps: nobody can tell
        registry.ensure_base("/models/llama")


def test_what_older_and_newer_versions_of_kibitz_recorded_is_read_and_kept(registry, database, tmp_path):
    older = {"kl": 0.2}
    newer = older | {"judged_at": "2026-01-02T03:04:05.678900+00:00", "a figure of next year": [1, None]}
    versions = [candidate(registry, tmp_path) for _ in (older, newer)]
    stored = sa.table("policies", sa.column("name"), sa.column("metrics", sa.JSON))
    with database.begin() as connection:
        for version, metrics in zip(versions, (older, newer), strict=True):
            connection.execute(stored.update().where(stored.c.name == version.name).values(metrics=metrics))
    first, second = (registry.get(version.name) for version in versions)
    assert (first.metrics.kl, first.metrics.reasons, first.judged_at, first.awaited_reactions) == (0.2, [], None, 0)
    assert (first.judged_against, second.judged_at.year) == (BASE, 2026)
    registry.promote(second.name, second.metrics | Metrics(reasons=["none"]))
    assert registry.roll_back()[1].name == BASE
    with database.read() as connection:
        kept = connection.execute(sa.select(stored.c.metrics).where(stored.c.name == second.name)).scalar_one()
    assert kept == newer | {"reasons": ["none"]}, "what is not known is kept, and what was not said stays away"


def test_names_and_directories_are_never_used_again(registry, tmp_path):
    first = registry.reserve(registry.get(BASE))
    registry.reject(first.name)
    second = registry.reserve(registry.get(BASE))
    assert (first.name, second.name) == ("policy-1", "policy-2")
    assert first.path != second.path


def test_promoting_retires_the_live_one_and_a_rollback_brings_it_back(registry, tmp_path):
    one = candidate(registry, tmp_path)
    registry.promote(one.name)
    two = candidate(registry, tmp_path, parent=one.name)
    registry.promote(two.name)
    assert [version.state for version in registry.all()] == ["retired", "retired", "live"]
    taken_back, live = registry.roll_back()
    assert (taken_back.name, live.name, registry.get_live().name) == (two.name, one.name, one.name)
    assert registry.roll_back()[1].name == BASE
    with pytest.raises(RegistryError, match="no version to go back to"):
        registry.roll_back()


def promoted(registry, tmp_path, count):
    versions = [candidate(registry, tmp_path) for _ in range(count)]
    for version in versions:
        registry.promote(version.name)
    return [version.name for version in versions]


@pytest.mark.parametrize("purged", [{2}, {1}, {1, 2}, {0, 1, 2}])
def test_a_rollback_passes_by_what_was_purged(registry, database, tmp_path, purged):
    names = promoted(registry, tmp_path, 4)
    with database.begin() as connection:
        Versions(connection, registry.directory).purge({names[number] for number in purged})
    left = [name for number, name in enumerate(names) if number not in purged]
    assert registry.get_live().name == names[3]
    for name in [*reversed(left[:-1]), BASE]:
        assert registry.roll_back()[1].name == name
    with pytest.raises(RegistryError, match="no version to go back to"):
        registry.roll_back()


def test_withdrawing_the_live_version_passes_by_what_was_purged_before(registry, database, tmp_path):
    first, second, third = promoted(registry, tmp_path, 3)
    for names, live in (({second}, third), ({third}, first), ({first}, BASE)):
        with database.begin() as connection:
            assert [version.name for version in Versions(connection, registry.directory).purge(names)] == list(names)
        assert registry.get_live().name == live
    with database.begin() as connection:
        assert Versions(connection, registry.directory).purge({first, second}) == []  # forgetting twice is forgetting once


def test_versions_that_replaced_each_other_in_turn_can_all_be_withdrawn(registry, database, tmp_path):
    first, second = promoted(registry, tmp_path, 2)
    registry.promote(first)  # deployed again by hand: it has replaced its own successor now
    with database.begin() as connection:
        Versions(connection, registry.directory).purge({first, second})
    assert registry.get_live().name == BASE


@pytest.mark.parametrize(("before", "after"), list(product(PolicyState, PolicyState)))
def test_only_the_transitions_of_the_table_are_made(registry, tmp_path, before, after):
    paths = {
        PolicyState.TRAINING: [],
        PolicyState.CANDIDATE: [PolicyState.CANDIDATE],
        PolicyState.CANARY: [PolicyState.CANDIDATE, PolicyState.CANARY],
        PolicyState.REJECTED: [PolicyState.REJECTED],
    }
    if before in paths and after != PolicyState.LIVE:
        version = registry.reserve(registry.get(BASE))
        for state in paths[before]:
            registry.move(version.name, state)
    else:
        version = candidate(registry, tmp_path)
        registry.promote(version.name)
        if before == PolicyState.RETIRED:
            registry.roll_back()
        elif before != PolicyState.LIVE:
            return  # a second live version cannot even be tried: promote() retires the first
    if after in TRANSITIONS[before] and after != PolicyState.LIVE:
        assert registry.move(version.name, after).state == after
    elif after not in TRANSITIONS[before]:
        with pytest.raises(RegistryError, match="cannot become"):
            registry.move(version.name, after)
        assert registry.get(version.name).state == before


def test_there_is_never_a_second_live_version(registry, tmp_path):
    one = candidate(registry, tmp_path)
    with pytest.raises(Exception, match=r"(?i)unique"):
        registry.move(one.name, PolicyState.LIVE)
    assert registry.get_live().name == BASE


def test_a_version_that_is_not_there_says_so(registry):
    with pytest.raises(RegistryError, match="kibitz policies"):
        registry.promote("policy-9")
    assert registry.get_live().name == BASE


def test_a_candidate_is_promoted_only_in_the_place_of_what_it_was_judged_against(registry, tmp_path):
    one, two = candidate(registry, tmp_path), candidate(registry, tmp_path)
    assert one.judged_against == two.judged_against == BASE, "where nothing else is recorded it was the parent"
    registry.promote(one.name, instead_of=one.judged_against)
    with pytest.raises(VerdictOutdated, match=f"{two.name} was judged against {BASE}, but {one.name} is live now"):
        registry.promote(two.name, instead_of=two.judged_against)
    assert registry.get_live().name == one.name
    assert registry.get(two.name).state == PolicyState.CANDIDATE


def test_deployments_are_requested_of_candidates_alone_and_stay_requested(registry, tmp_path):
    one, two, three = (candidate(registry, tmp_path) for _ in range(3))
    for version in (two, one, one):
        registry.request_deployment(version.name)
    assert [version.name for version in registry.find_requested()] == [one.name, two.name]
    registry.promote(one.name)
    registry.reject(three.name)
    assert [version.name for version in registry.find_requested()] == [two.name]
    for version, state in ((one, "live"), (three, "rejected")):
        with pytest.raises(RegistryError, match=f"{version.name} is {state}: only a candidate can be deployed"):
            registry.request_deployment(version.name)


@pytest_asyncio.fixture
async def nobody(config) -> AsyncIterator[Policy]:
    """A server that is not there."""
    policy = Policy("http://127.0.0.1:9", config.policy)
    yield policy
    await policy.close()


def make_learner(store: ConversationStore, policy: Policy, registry: PolicyRegistry, config: Config) -> OnlineLearner:
    return OnlineLearner(store, Deployment(policy, registry, config.serving, config.training, config.gate), config)


async def test_what_a_forgotten_person_taught_is_learned_anew_also_where_kibitz_was_stopped_meanwhile(
    registry, database, tmp_path, config, tokenizer, nobody
):
    store = ConversationStore(database)
    learner = make_learner(store, nobody, registry, config)
    given = [react(store, answered(store, tokenizer, "hello", "ok", author=one), True, one) for one in ("ann", "bob")]
    assert await learner._count_learned() == 0
    version = registry.reserve(registry.get(BASE))
    registry.begin_run(version.name, {}, "", [given[0].id])
    registry.complete(version.name, "hash", Metrics())
    assert await learner._count_learned() == 2, "a restart does not train again on them"
    forget_person(database, registry, "test", "ann")
    assert await learner._count_learned() == 0, "and the rest is learned anew"


def test_a_run_does_not_begin_with_a_question_that_was_deleted_meanwhile(registry, database, tokenizer):
    store = ConversationStore(database)
    kept, gone = (answered(store, tokenizer, text, "ok", author=text) for text in ("ann", "bob"))
    forget_person(database, registry, "test", "bob")
    version = registry.reserve(registry.get(BASE))
    with pytest.raises(RegistryError, match=f"some training data of {version.name} was deleted meanwhile"):
        registry.begin_run(version.name, {}, "", [], [], [kept.id, gone.id])
    assert registry.list_runs() == []
    registry.begin_run(version.name, {}, "", [], [], [kept.id])
    registry.complete(version.name, "hash", Metrics())
    forget_person(database, registry, "test", "cleo")
    assert registry.get(version.name).state != PolicyState.PURGED
    forget_person(database, registry, "test", "ann")
    assert registry.get(version.name).state == PolicyState.PURGED


async def test_a_look_at_the_versions_reads_none_of_their_metrics(registry, database, tmp_path, config, nobody):
    version = candidate(registry, tmp_path)
    registry.move(version.name, PolicyState.PURGED)
    read: list[str] = []
    listen = database.engine, "before_cursor_execute", lambda *details: read.append(details[2])
    sa.event.listen(*listen)
    learner = make_learner(ConversationStore(database), nobody, registry, config)  # no server is asked
    assert learner._read_counts()[1] == 1
    assert registry.find_directories(PolicyState.PURGED) == {version.name: version.path}
    assert list(registry.find_directories()) == [BASE, version.name]
    assert registry.find_foreign() == set()
    assert read
    assert not any("metrics" in statement for statement in read)
    registry.all()
    assert "metrics" in read[-1], "the control"
    sa.event.remove(*listen)
