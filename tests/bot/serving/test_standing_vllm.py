"""The vLLM that stays up between runs: nothing that an earlier run left in it reaches the next one."""

import asyncio

import pytest
import standing_vllm
from conftest import claim_vllm, live_config

from bot.errors import ProbeFailed, ServingError
from bot.store.registry import BASE
from learning.bench import swap


async def test_a_run_finds_nothing_of_an_earlier_one_in_the_vllm_that_stays_up(live, demo_model, tmp_path):
    """Both call their first version policy-1."""
    url = live.policy.admin.url
    old, new = tmp_path / "old", tmp_path / "new"
    for seed, source in enumerate((old, new)):
        await asyncio.to_thread(swap.save_random_version, live.config, demo_model, source, seed)

    def running(name: str):
        return standing_vllm.running_on(url, live_config(tmp_path / name, demo_model), demo_model, lambda text: None)

    def register(kibitz) -> str:
        return swap.register_copy(kibitz.registry, new).name

    try:
        async with running("one") as first:
            await first.policy.admin.load_adapter("policy-1", str(old))
            with pytest.raises(ProbeFailed):  # the control: what is left behind does matter
                await first.deployment.deploy(register(first))
            await first.policy.admin.load_adapter("policy-1", str(old))
            await first.policy.admin.replace_weights("policy-2", demo_model)
        async with running("two") as second:
            assert (await second.policy.admin.list_adapters(), second.policy.admin.weights_version) == (set(), BASE)
            name = register(second)
            await second.deployment.deploy(name)
            assert (name, second.policy.version) == ("policy-1", "policy-1")
    finally:  # the kibitz that the other tests share goes on, with a policy-1 of its own
        await standing_vllm.make_fresh(live.policy.admin, demo_model)
        await live.deployment.restore_live()


def test_a_second_process_of_a_run_that_uses_vllm_is_told_which_option_prevents_it(tmp_path):
    claim_vllm(tmp_path)
    with pytest.raises(pytest.fail.Exception, match="run pytest with --dist loadgroup"):
        claim_vllm(tmp_path)


def test_two_runs_do_not_use_one_vllm_at_once():
    url = "http://127.0.0.1:1"
    with standing_vllm.used_alone(url):
        with pytest.raises(ServingError, match="another run of the tests uses the vLLM"), standing_vllm.used_alone(url):
            pytest.fail("it is in use")
        with standing_vllm.used_alone("http://127.0.0.1:2"):
            pass  # the control: another one is free
    with standing_vllm.used_alone(url):
        pass
