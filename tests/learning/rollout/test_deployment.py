"""How a candidate goes live, stays a candidate, or is rejected: the registry and the deployment together, on a server of
vLLM's routes on loopback that can be made to fail. What the real vLLM makes of swaps is in test_loop.
"""

import asyncio
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import until
from fake_vllm import FakeVllm

from bot import app
from bot.errors import DatabaseUnavailable, ProbeFailed, RegistryError, ServerUnavailable, ServingError, VerdictOutdated
from bot.store.database import Database
from bot.store.registry import BASE, PolicyRegistry
from bot.store.weights import ADAPTER_FILES
from bot.types import PolicyState
from learning.rollout.deployment import DEPLOY_TRIES, Deployment


async def test_a_candidate_goes_live_in_the_place_of_what_it_was_judged_against(stage, vllm):
    one = stage.candidate()
    await stage.deployment.deploy(one.name)
    two = stage.candidate()
    await stage.deployment.deploy(two.name)
    assert (stage.state(one), stage.state(two)) == (PolicyState.RETIRED, PolicyState.LIVE)
    assert set(vllm.adapters) == {two.name} == {stage.deployment.policy.version}
    assert await stage.deployment.deploy(two.name) == stage.registry.get(two.name), "whoever asks second is told the same"


async def test_the_live_version_is_served_from_where_the_data_directory_was_moved_to(
    stage, vllm, config, database, tmp_path_factory
):
    one = stage.candidate()
    await stage.deployment.deploy(one.name)
    vllm.adapters.clear()
    database.close()
    other = config.model_copy(update={"data_dir": str(tmp_path_factory.mktemp("other") / "data")})
    shutil.move(config.data, other.data)
    with closing(Database(other.database_url, other.data)) as moved:
        parts = stage.deployment.policy, PolicyRegistry(moved), other.serving, other.training, other.gate
        await Deployment(*parts, stage.told.append).restore_live()
    assert vllm.adapters == {one.name: other.data / "policies" / one.name}
    assert stage.deployment.policy.version == one.name


async def test_a_run_under_way_does_not_undo_a_rollback(stage, vllm):
    one = stage.candidate()
    await stage.deployment.deploy(one.name)
    two = stage.candidate()  # judged against the version that is taken back now
    await stage.deployment.rollback()
    with pytest.raises(VerdictOutdated, match=f"was judged against {one.name}, but {BASE} is live now"):
        await stage.deployment.deploy(two.name)
    assert stage.registry.get_live().name == BASE
    assert stage.state(two) == PolicyState.REJECTED
    assert "was judged against" in stage.registry.get(two.name).metrics.reasons[0]
    assert vllm.adapters == {}


async def test_a_rollback_while_a_candidate_is_being_proven_is_not_undone(stage, vllm, monkeypatch):
    one = stage.candidate()
    await stage.deployment.deploy(one.name)
    two, real = stage.candidate(), stage.deployment._probe

    async def probed_and_taken_back(version):
        await real(version)
        stage.registry.roll_back()

    monkeypatch.setattr(stage.deployment, "_probe", probed_and_taken_back)
    with pytest.raises(VerdictOutdated):
        await stage.deployment.deploy(two.name)
    assert stage.registry.get_live().name == BASE
    assert two.name not in vllm.adapters
    assert stage.state(two) == PolicyState.REJECTED


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/completions", "/v1/models"])
async def test_a_server_that_is_away_for_a_moment_rejects_nothing(stage, vllm, path):
    one = stage.candidate()
    vllm.broken.add(path)
    with pytest.raises(ServerUnavailable):
        await stage.deployment.deploy(one.name)
    assert stage.state(one) == PolicyState.CANDIDATE
    assert path == "/v1/models" or one.name not in vllm.adapters
    vllm.broken.clear()
    assert (await stage.deployment.deploy(one.name)).name == stage.registry.get_live().name == one.name


async def test_a_server_that_refuses_a_candidate_rejects_it(stage, vllm, monkeypatch):
    """The control: it was asked."""
    one = stage.candidate()
    monkeypatch.setattr(FakeVllm, "likely", lambda self, body: {"token_id:1": -9.0})
    with pytest.raises(ProbeFailed):
        await stage.deployment.deploy(one.name)
    assert stage.state(one) == PolicyState.REJECTED
    assert vllm.adapters == {}
    assert not any((Path(one.path) / name).exists() for name in ADAPTER_FILES), "what never serves need not be kept"
    assert (Path(one.path) / "probe.json").exists(), "the rest explains it"
    with pytest.raises(ProbeFailed):  # whoever asks second is told the same
        await stage.deployment.deploy(one.name)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RegistryError("purged meanwhile"), RegistryError),
        (sa.exc.OperationalError("", {}, Exception("locked")), DatabaseUnavailable),
    ],
)
async def test_an_error_of_the_registry_leaves_no_adapter_loaded(stage, vllm, monkeypatch, error, told):
    def fails(*_):
        raise error

    one = stage.candidate()
    monkeypatch.setattr(stage.registry, "promote", fails)
    with pytest.raises(told):
        await stage.deployment.deploy(one.name)
    assert "/v1/load_lora_adapter" in vllm.paths, "it was loaded"
    assert vllm.adapters == {}
    assert stage.state(one) == PolicyState.CANDIDATE
    monkeypatch.undo()
    assert (await stage.deployment.deploy(one.name)).state == PolicyState.LIVE


async def watched(deployment: Deployment, condition) -> None:
    """Let a deployment follow the registry until `condition` holds."""
    task = asyncio.create_task(deployment.watch(0.01))
    try:
        await until(condition)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_a_crash_left_behind_is_deployed_and_what_nobody_asked_for_is_not(stage):
    kept, wanted, outdated = stage.candidate(), stage.candidate(), stage.candidate()
    for version in (wanted, outdated):
        stage.registry.request_deployment(version.name)
    stage.registry.request_deployment(wanted.name)  # twice is once
    await watched(stage.deployment, lambda: any("is not deployed" in text for text in stage.told))
    assert stage.state(wanted) == PolicyState.LIVE
    assert stage.state(outdated) == PolicyState.REJECTED
    assert stage.state(kept) == PolicyState.CANDIDATE
    assert f"{outdated.name} was judged against {BASE}, but {wanted.name} is live now" in "\n".join(stage.told)
    with pytest.raises(RegistryError, match=f"{wanted.name} is live: only a candidate can be deployed"):
        stage.registry.request_deployment(wanted.name)


async def test_a_candidate_waits_until_the_server_answers(stage, vllm):
    one = stage.candidate()
    stage.registry.request_deployment(one.name)
    vllm.broken.add("/v1/completions")
    await watched(stage.deployment, lambda: "/v1/completions" in vllm.paths)
    assert stage.state(one) == PolicyState.CANDIDATE
    vllm.broken.clear()
    await watched(stage.deployment, lambda: stage.state(one) == PolicyState.LIVE)
    assert stage.deployment._tries[one.name] == 0, "it was not tried while nobody could have answered"


async def test_a_candidate_that_a_sound_server_fails_at_each_time_is_rejected_in_the_end(stage, vllm, monkeypatch):
    monkeypatch.setattr("learning.rollout.deployment.RETRY_SECONDS", 0.01)
    one = stage.candidate()
    stage.registry.request_deployment(one.name)
    vllm.broken.add("/v1/load_lora_adapter")
    await watched(
        stage.deployment, lambda: any(f"could not be deployed in {DEPLOY_TRIES} tries" in text for text in stage.told)
    )
    assert stage.state(one) == PolicyState.REJECTED
    assert vllm.paths.count("/v1/load_lora_adapter") == DEPLOY_TRIES


async def test_a_base_model_is_changed_only_once_it_has_generated_a_token(vllm, config, registry, demo_model, tmp_path):
    another = shutil.copytree(demo_model, tmp_path / "another")
    with (another / "model.safetensors").open("r+b") as weights:  # the same model but for one number
        weights.seek(-1, 2)
        weights.write(b"\x11")
    dialogue = config.dialogue.model_copy(update={"embedder": "none"})
    serving = config.serving.model_copy(update={"url": vllm.url})
    config = config.model_copy(update={"serving": serving, "dialogue": dialogue})
    vllm.broken.add("/v1/completions")
    with pytest.raises(ExceptionGroup) as failed:
        async with app.running(config, str(another), lambda text: None, may_change_base=True):
            pass
    assert failed.group_contains(ServingError, match="generates no token")
    assert [version.name for version in registry.all()] == [BASE]
    assert registry.get_live().base_model == demo_model
    vllm.broken.clear()
    told: list[str] = []
    async with app.running(config, str(another), told.append, may_change_base=True) as kibitz:
        assert kibitz.policy.version == kibitz.policy.admin.base == registry.get_live().name == "policy-1"
    assert any("policy-1 is live; 1 version of another model can serve" in line for line in told), told
