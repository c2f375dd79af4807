"""VllmServer: starts a vLLM server, waits until it generates, restarts it when it dies, and stops it.

It does not load adapters: a callback is called after each restart, and restores the served versions.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

from bot import THREAD_ENVIRONMENT
from bot.accelerator import GIB, has_gpu, read_card
from bot.config import VLLM_HOST, PolicyConfig, ServingConfig, TrainingConfig
from bot.data_directory import is_locked
from bot.environment import http_url, listen
from bot.errors import ServingError
from bot.models.dtype import choose_dtype
from bot.serving import children
from bot.serving.policy import Policy
from bot.serving.vllm_arguments import find_entry_point, list_own_options
from bot.serving.vllm_log import find_first_cause
from bot.supervision import Health, supervise

PROBE_SECONDS = 10
USAGE_EXIT_CODE = 2  # the exit code of a vLLM that cannot read its command line
RUN_SECONDS = 3600  # the longest wait of a restart for the GPU memory of a training run
# Parts of vLLM's errors about too little memory.
NO_MEMORY = ("out of memory", "OutOfMemory", "less than desired", "No available memory", "available KV cache memory")


class VllmServer:
    """A child process with vLLM's OpenAI server, on loopback."""

    def __init__(self, serving: ServingConfig, policy: PolicyConfig, training: TrainingConfig, data: Path, model: str):
        self.serving = serving
        self.policy_config = policy
        self.training = training
        self.data = data
        self.model = model
        self.port = _find_free_port(serving.port)
        self.url = http_url(VLLM_HOST, self.port)
        self.log_path = data / "vllm.log"
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0  # the log's size at the newest start

    async def start(self, policy: Policy) -> None:
        """Start the process and wait until it generates a token. Raises ServingError if it ends or takes too long."""
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._process = await children.start(
                *self._command(),
                niceness=children.SERVING_NICENESS,
                on=None if has_gpu() else children.find_spare_cores(),
                stdout=log,
                stderr=log,
                env=self._environment(),
            )
        deadline = asyncio.get_running_loop().time() + self.serving.startup_seconds
        while not await policy.admin.is_ready(PROBE_SECONDS):
            if self._process.returncode is not None:
                raise ServingError(
                    f"vLLM ended with code {self._process.returncode} while starting; {self._describe_failure()}"
                )
            if asyncio.get_running_loop().time() > deadline:
                await self.stop()
                raise ServingError(
                    f"vLLM was not ready after {self.serving.startup_seconds} s; {self._describe_failure()}, "
                    "or raise serving.startup_seconds"
                )
            await asyncio.sleep(0.5)

    async def watch(self, policy: Policy, restored: Callable[[], Awaitable[None]], health: Health) -> None:
        """Restart the server whenever it dies or stops generating, and call `restored` after each restart. Runs for ever."""

        async def look() -> None:
            if self._process is not None:
                await self._wait_for_death(policy)
                policy.admin.mark_lost()
                await self.stop()
                raise ServingError(f"it does not answer any more and is restarted; {self._describe_failure()}")
            await self.wait_for_memory(health.tell)
            try:
                await self.start(policy)
                await restored()
            except BaseException:
                await self.stop()
                raise

        await supervise("vLLM", look, health, every=0)

    async def stop(self) -> None:
        """End the process and its children, with SIGTERM and then with SIGKILL."""
        process = self._process
        if process is None:
            return
        for sign, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), seconds)
                break
        with contextlib.suppress(ProcessLookupError):  # engine processes that outlived their parent
            os.killpg(process.pid, signal.SIGKILL)
        self._process = None

    async def _wait_for_death(self, policy: Policy) -> None:
        assert self._process is not None
        silent = 0
        while silent < 3:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), PROBE_SECONDS)
                return
            silent = 0 if policy.is_asleep or await policy.admin.is_ready(PROBE_SECONDS) else silent + 1

    async def wait_for_memory(self, tell: Callable[[str], None]) -> None:
        """Wait while a training run holds the GPU memory that vLLM needs to start. `tell` gets one line about the wait."""
        wanted = self.serving.memory_share
        deadline = asyncio.get_running_loop().time() + RUN_SECONDS
        is_told = False
        while is_locked(self.data, "train") and asyncio.get_running_loop().time() < deadline:
            card = await asyncio.to_thread(read_card)
            if card is None or card.free >= wanted * card.total:
                return
            if not is_told:
                is_told = True
                tell(
                    f"vLLM waits for the training run: it needs {wanted * card.total / GIB:.1f} GiB of the GPU, "
                    f"{card.free / GIB:.1f} are free"
                )
            await asyncio.sleep(1)

    def _command(self) -> list[str]:
        options = {
            "--port": str(self.port),
            "--dtype": choose_dtype(self.serving, self.model),
            **list_own_options(self.serving, self.policy_config),
        }
        own = [part for name, value in options.items() for part in (name, value) if part]
        return find_entry_point(self.model) + own + self.serving.extra_args

    def _environment(self) -> dict[str, str]:
        defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if not has_gpu():
            # One core is left to the other processes: vLLM on all cores slows them and itself (docs/experiments.md).
            defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(children.find_spare_cores()))}
            defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if self.training.weights == "full" or self.serving.sleep_while_training:
            defaults["VLLM_SERVER_DEV_MODE"] = "1"  # needed to replace weights and to sleep
        inherited = {name: value for name, value in os.environ.items() if THREAD_ENVIRONMENT.get(name) != value}
        return {**defaults, **inherited, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}

    def _describe_failure(self) -> str:
        """Return vLLM's own error and, if it is known, what to do; otherwise the path of its log."""
        if not self.log_path.exists():
            return f"see {self.log_path}"
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            cause = find_first_cause(log.read().decode(errors="replace"))
        if not cause:
            return f"see {self.log_path}"
        is_misread = self._process is not None and self._process.returncode == USAGE_EXIT_CODE
        advice = "; correct serving.extra_args" if is_misread and self.serving.extra_args else ""
        if any(sign in cause for sign in NO_MEMORY):
            advice = "; lower policy.context_tokens or serving.memory_share, or end other programs that use the memory"
        return f"vLLM says: {cause}{advice} (its log: {self.log_path})"


def _find_free_port(wanted: int) -> int:
    with listen("serving.port", VLLM_HOST, wanted, otherwise=", or set 0 for any") as probe:
        return int(probe.getsockname()[1])
