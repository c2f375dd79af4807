"""A vLLM that stays up between runs of the tests: `make vllm` starts it, `pytest --vllm-url URL` uses it.

A run begins by making it as good as new, and leaves it running. One run uses it at a time.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import pytest

from bot import app as kibitz
from bot.config import Config
from bot.data_directory import lock_directory
from bot.errors import ServingError
from bot.serving.admin import FRESH, ServerAdmin
from bot.serving.policy import Policy
from bot.serving.vllm_server import VllmServer
from bot.supervision import Health


class StandingVllm(VllmServer):
    """A vLLM whose process belongs to somebody else: it is emptied instead of started, and never stopped."""

    def __init__(self, url: str, *own: Any):
        super().__init__(*own)
        self.url = url.rstrip("/")

    async def start(self, policy: Policy) -> None:
        """Make the server as good as new. Raises ServingError where it does not let itself be changed."""
        await make_fresh(policy.admin, self.model)

    async def watch(self, policy: Policy, restored: Callable[[], Awaitable[None]], health: Health) -> None:
        """Leave restarts to whoever started the server."""
        await asyncio.Event().wait()


async def make_fresh(admin: ServerAdmin, model: str) -> None:
    """Take a server's adapters away and give it the weights of the model, as if it had just been started with that.

    Each run counts its versions from policy-1, and the prefix cache knows adapters by name: it is emptied too.
    """
    await admin.connect()
    for name in await admin.list_adapters():
        await admin.unload_adapter(name)
    await admin.replace_weights(FRESH, model)


@contextlib.asynccontextmanager
async def running_on(url: str, config: Config, model: str, tell: kibitz.Announce) -> AsyncIterator[kibitz.Kibitz]:
    """Run a kibitz as `bot.app.running` does, on a vLLM that is up already."""
    async with contextlib.AsyncExitStack() as stack:
        with pytest.MonkeyPatch.context() as patched:  # until it runs: other tests of this process start their own
            patched.setattr(kibitz, "VllmServer", partial(StandingVllm, url))
            running = await stack.enter_async_context(kibitz.running(config, model, tell))
        yield running


@contextlib.contextmanager
def used_alone(url: str) -> Iterator[None]:
    """Hold the server for one run of the tests. Raises ServingError where another run holds it."""
    lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"kibitz-tests-{urlsplit(url).port}.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ServingError(f"another run of the tests uses the vLLM at {url}; wait until it ends") from error
    try:
        yield
    finally:
        lock.release()


async def keep(config: Config, model: str) -> None:
    """Start a vLLM, say where it is, and keep it until this task is cancelled. Raises ServingError where it ends before."""
    with lock_directory(config.data, "serve"):
        server = VllmServer(config.serving, config.policy, config.training, config.data, model)
        policy = Policy(server.url, config.policy)
        print(f"starting vLLM (its log: {server.log_path})", flush=True)
        try:
            await server.start(policy)
            print(f"vLLM stays up until Ctrl-C; use it with pytest --vllm-url {server.url}", flush=True)
            assert server._process is not None
            raise ServingError(f"vLLM ended with code {await server._process.wait()}; see {server.log_path}")
        finally:
            await policy.close()
            await server.stop()
