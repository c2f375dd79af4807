"""VllmServer: a vLLM that we own: start it, prove that it generates, restart it when it dies, stop it.

It knows no version: whoever starts it is told of each (re)start and restores what must be served.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from bot import children
from bot.config import Config
from bot.errors import ConfigError, KibitzError, ServingError
from bot.policy import Policy
from bot.registry import BASE

HOST = "127.0.0.1"  # --api-key guards only /v1, so nobody but this machine may reach the rest
PROBE_SECONDS = 10
RESTARTS = 5


class VllmServer:
    """A child process with vLLM's OpenAI server, on loopback."""

    def __init__(self, config: Config, model: str):
        self.config = config
        self.model = model
        self.port = _free_port(config.serving.port)
        self.url = f"http://{HOST}:{self.port}"
        self.log = config.data / "vllm.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, policy: Policy) -> None:
        """Start the process and wait until it generates a token."""
        with self.log.open("ab") as log:
            self._process = await children.start(
                *self._command(),
                niceness=children.SERVING,
                on=None if _has_gpu() else children.spare(),
                stdout=log,
                stderr=log,
                env=self._environment(),
            )
        deadline = asyncio.get_running_loop().time() + self.config.serving.startup_seconds
        while not await policy.ready(PROBE_SECONDS):
            if self._process.returncode is not None:
                raise ServingError(f"vLLM ended with code {self._process.returncode} while starting; {self._why()}")
            if asyncio.get_running_loop().time() > deadline:
                await self.stop()
                raise ServingError(
                    f"vLLM was not ready after {self.config.serving.startup_seconds} s; see {self.log}, "
                    "or raise serving.startup_seconds"
                )
            await asyncio.sleep(0.5)

    async def watch(self, policy: Policy, restarted: Callable[[], Awaitable[None]], tell: Callable[[str], None]) -> None:
        """Restart the server whenever it dies or stops generating, and call `restarted` each time.

        Runs for ever; gives up, and tells so, when it fails too often in a row.
        """
        failures = 0
        while failures < RESTARTS:
            await self._wait_for_death(policy)
            tell("vLLM does not answer any more; restarting it")
            policy.lost()
            await self.stop()
            await asyncio.sleep(min(60, 2**failures))
            try:
                await self.start(policy)
                await restarted()
                failures = 0
            except KibitzError:
                failures += 1
        tell(f"vLLM could not be restarted {RESTARTS} times in a row, nothing can be answered; {self._why()}")

    async def stop(self) -> None:
        """End the process and its children: politely first, then by force."""
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
        silent = 0
        if self._process is None:  # the last restart failed
            return
        while silent < 3:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), PROBE_SECONDS)
                return
            silent = 0 if await policy.ready(PROBE_SECONDS) else silent + 1

    def _command(self) -> list[str]:
        serving = self.config.serving
        longest = self.config.policy.context_tokens + self.config.policy.max_tokens
        # The console script `vllm` asks for metadata that the CPU build does not have; the module runs under both.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        options = {
            "--model": self.model,
            "--served-model-name": BASE,
            "--host": HOST,
            "--port": str(self.port),
            "--dtype": served_dtype(self.config, self.model),
            "--max-model-len": str(longest),
            "--max-loras": str(serving.max_loras),
            "--max-lora-rank": str(serving.max_lora_rank),
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",
        }
        flags = ["--enable-lora", "--disable-uvicorn-access-log"]
        if not _has_gpu():
            # A prompt that is read in pieces ends the CPU engine (0.32) where its answer is sampled with a seed.
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
        return command + [part for pair in options.items() for part in pair] + flags + serving.extra_args

    def _environment(self) -> dict[str, str]:
        defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        # One core is left to everybody else: what wanders over all of them slows us and itself (docs/experiments.md).
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(children.spare()))}
        if self.config.training.weights == "full":
            defaults["VLLM_SERVER_DEV_MODE"] = "1"  # without it weights cannot be changed
        return {**defaults, **os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}

    def _why(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [line for line in lines[-200:] if "Error" in line]
        return f"the last error in {self.log}: {errors[-1].strip()[:300]}" if errors else f"see {self.log}"


def served_dtype(config: Config, model: str) -> str:
    """The number format of server and trainer alike: as configured, or as the model was saved."""
    if config.serving.dtype != "auto":
        return config.serving.dtype
    from transformers import AutoConfig

    saved = AutoConfig.from_pretrained(model).dtype
    return str(saved).removeprefix("torch.") if saved is not None else "auto"


def _free_port(wanted: int) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError as error:
            raise ConfigError(
                f"config key serving.port has value {wanted}, which is in use; free it, choose another, or set 0 for any"
            ) from error
        return probe.getsockname()[1]


def _has_gpu() -> bool:
    return Path("/dev/nvidia0").exists()
