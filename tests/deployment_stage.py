"""A deployment on a server of vLLM's routes on loopback that can be made to fail."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from fake_vllm import FakeVllm

from bot.serving.policy import Policy
from bot.store.registry import BASE, PolicyRegistry
from bot.types import PolicyState, PolicyVersion
from learning.bench import swap
from learning.rollout.deployment import Deployment


@pytest_asyncio.fixture
async def vllm(tokenizer) -> AsyncIterator[FakeVllm]:
    made = FakeVllm(tokenizer)
    await made.start()
    yield made
    await made.stop()


@dataclass
class Stage:
    """A deployment on the server, and what it told people."""

    deployment: Deployment
    registry: PolicyRegistry
    source: Path
    told: list[str]

    def candidate(self) -> PolicyVersion:
        """A candidate that was judged against what is live now."""
        return swap.register_copy(self.registry, self.source)

    def state(self, version: PolicyVersion) -> PolicyState:
        return self.registry.get(version.name).state


@pytest.fixture(scope="module")
def source(demo_model, tmp_path_factory) -> Path:
    """The weights of a version, with their probe."""
    from bot.config import Config

    directory = tmp_path_factory.mktemp("weights") / "source"
    swap.save_random_version(Config(), demo_model, directory, seed=0)
    return directory


@pytest_asyncio.fixture
async def stage(vllm, config, registry, source) -> AsyncIterator[Stage]:
    policy = Policy(vllm.url, config.policy, base=BASE)
    await policy.admin.connect()
    told: list[str] = []
    deployment = Deployment(policy, registry, config.serving, config.training, config.gate, told.append)
    yield Stage(deployment, registry, source, told)
    await policy.close()
