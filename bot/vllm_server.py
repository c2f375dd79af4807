"""VllmServer: a vLLM that we own: start it, prove that it generates, restart it when it dies, stop it.

It knows no version: whoever starts it is told of each (re)start and restores what must be served.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from bot import WAITING, children
from bot.accelerator import GIB, has_gpu, read_card
from bot.config import VLLM_HOST, Config
from bot.data_directory import is_held
from bot.environment import http_url, listen
from bot.errors import ConfigError, ServingError
from bot.policy import Policy
from bot.registry import BASE
from bot.supervision import Health, supervise

PROBE_SECONDS = 10
USAGE = 2  # the exit code of a vLLM that cannot read its command line
# What reads vLLM's command line, at its places in the versions that there are; it is importing this that takes its time.
READ_ARGUMENTS = """
import sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
make_arg_parser(FlexibleArgumentParser(prog="vllm")).parse_args(sys.argv[1:])
"""
# What sets an option of vLLM that kibitz gives it.
KEYS = {
    "--model": "policy.model",
    "--port": "serving.port",
    "--dtype": "serving.dtype",
    "--max-model-len": "policy.context_tokens and policy.max_tokens",
    "--gpu-memory-utilization": "serving.memory_share",
    "--max-loras": "serving.max_loras",
    "--max-lora-rank": "serving.max_lora_rank",
}
READ_AT_ONCE = 2048  # tokens, on CPUs: at least as many as the longest prompt
RUN_SECONDS = 3600  # the longest that a restart waits for a training run to give its memory back
# vLLM's processes name themselves before each line, its logger adds level, time and place.
LOG_PREFIX = re.compile(r"^(\(\w+(?: \w+)* pid=\d+\) ?)?([A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]+\] ?)?")
EXCEPTION = re.compile(r"^(?:[\w]+\.)*(\w*(?:Error|Exception|Interrupt)): ?(.*)$")
WRAPPERS = ("Engine core initialization failed", "cancelled", "Engine process failed to start")
# What vLLM says where memory is short, and what to do about it.
NO_MEMORY = ("out of memory", "OutOfMemory", "less than desired", "No available memory", "available KV cache memory")


class VllmServer:
    """A child process with vLLM's OpenAI server, on loopback."""

    def __init__(self, config: Config, model: str):
        self.config = config
        self.model = model
        self.port = _free_port(config.serving.port)
        self.url = http_url(VLLM_HOST, self.port)
        self.log = config.data / "vllm.log"
        self._process: asyncio.subprocess.Process | None = None
        self._log_start = 0  # where in the log the newest start begins

    async def start(self, policy: Policy) -> None:
        """Start the process and wait until it generates a token."""
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self._process = await children.start(
                *self._command(),
                niceness=children.SERVING,
                on=None if has_gpu() else children.spare(),
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
                    f"vLLM was not ready after {self.config.serving.startup_seconds} s; {self._why()}, "
                    "or raise serving.startup_seconds"
                )
            await asyncio.sleep(0.5)

    async def watch(self, policy: Policy, restored: Callable[[], Awaitable[None]], health: Health) -> None:
        """Restart the server whenever it dies or stops generating, and call `restored` each time. Runs for ever."""

        async def look() -> None:
            if self._process is not None:
                await self._wait_for_death(policy)
                policy.lost()
                await self.stop()
                raise ServingError(f"it does not answer any more and is started again; {self._why()}")
            await self.wait_for_memory(health.tell)
            try:
                await self.start(policy)
                await restored()
            except BaseException:
                await self.stop()
                raise

        await supervise("vLLM", look, health, every=0)

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
        assert self._process is not None
        silent = 0
        while silent < 3:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), PROBE_SECONDS)
                return
            silent = 0 if policy.is_asleep or await policy.ready(PROBE_SECONDS) else silent + 1

    async def wait_for_memory(self, tell: Callable[[str], None]) -> None:
        """Wait while a training run holds the GPU memory that vLLM needs: it would refuse to start."""
        wanted = self.config.serving.memory_share
        deadline = asyncio.get_running_loop().time() + RUN_SECONDS
        is_told = False
        while is_held(self.config.data, "train") and asyncio.get_running_loop().time() < deadline:
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
        options = {"--port": str(self.port), "--dtype": served_dtype(self.config, self.model), **_options(self.config)}
        own = [part for name, value in options.items() for part in (name, value) if part]
        return entry_point(self.model) + own + self.config.serving.extra_args

    def _environment(self) -> dict[str, str]:
        defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if not has_gpu():
            # One core is left to everybody else: what wanders over all of them slows us and itself (docs/experiments.md).
            defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(len(children.spare()))}
            defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if self.config.training.weights == "full" or self.config.serving.sleep_while_training:
            defaults["VLLM_SERVER_DEV_MODE"] = "1"  # without it weights cannot be changed, and vLLM does not sleep
        inherited = {name: value for name, value in os.environ.items() if WAITING.get(name) != value}
        return {**defaults, **inherited, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}

    def _why(self) -> str:
        """Why vLLM failed, in its own words, and what to do where that is known."""
        if not self.log.exists():
            return f"see {self.log}"
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            cause = first_cause(log.read().decode(errors="replace"))
        if not cause:
            return f"see {self.log}"
        is_misread = self._process is not None and self._process.returncode == USAGE
        advice = "; correct serving.extra_args" if is_misread and self.config.serving.extra_args else ""
        if any(sign in cause for sign in NO_MEMORY):
            advice = "; lower policy.context_tokens or serving.memory_share, or end what else uses the memory"
        return f"vLLM says: {cause}{advice} (its log: {self.log})"


def _options(config: Config) -> dict[str, str]:
    """The options of our own vLLM with their values, "" of those that have none, but for what is found out at start."""
    serving = config.serving
    longest = config.policy.context_tokens + config.policy.max_tokens
    found = {
        "--served-model-name": BASE,
        "--host": VLLM_HOST,
        "--max-model-len": str(longest),
        "--max-loras": str(serving.max_loras),
        "--max-lora-rank": str(serving.max_lora_rank),
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
        "--enable-lora": "",
        "--disable-uvicorn-access-log": "",
    }
    if serving.sleep_while_training:
        found["--enable-sleep-mode"] = ""
    if not has_gpu():
        # A prompt that is read in pieces ends the CPU engine (0.32) where its answer is sampled with a seed.
        found |= {"--enforce-eager": "", "--no-enable-chunked-prefill": ""}
        found["--max-num-batched-tokens"] = str(max(longest, READ_AT_ONCE))
    elif serving.memory_share:
        found["--gpu-memory-utilization"] = f"{serving.memory_share:g}"
    return found


def check_extra_args(config: Config) -> None:
    """Refuse arguments in `serving.extra_args` that kibitz gives vLLM itself. Raises ConfigError."""

    def name(argument: str) -> str:
        return argument.partition("=")[0].replace("_", "-").replace("--no-", "--")

    first = next(iter(config.serving.extra_args), "-")
    if not first.startswith("-"):  # it would be taken for the name of a model
        raise ConfigError(f"config key serving.extra_args begins with '{first}', which is no option; write --OPTION first")
    ours = {name(option) for option in ("--model", "--port", "--dtype", "--gpu-memory-utilization", *_options(config))}
    for argument in config.serving.extra_args:
        if argument.startswith("--") and name(argument) in ours:
            key = KEYS.get(name(argument), "")
            raise ConfigError(
                f"config key serving.extra_args has {argument.partition('=')[0]}, which kibitz sets itself; remove it"
                + (f", and set {key}" if key else "")
            )


def read_extra_args(config: Config) -> None:
    """Have the installed vLLM read `serving.extra_args`, without starting it (about 10 s). Raises ConfigError."""
    if not config.serving.extra_args:
        return
    command = [sys.executable, "-c", READ_ARGUMENTS, *config.serving.extra_args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=children.end_with_parent)
    if done.returncode != 0:
        cause = first_cause(done.stderr) or f"code {done.returncode}"
        raise ConfigError(f"config key serving.extra_args has a value that vLLM refuses ({cause}); correct it")


def entry_point(model: str) -> list[str]:
    """Return the command that starts vLLM's OpenAI server for a model.

    From 0.33 on that is `vllm serve`, as a module. It asks for the metadata of a package named "vllm", which the CPU build
    does not have: there the server's own module is run, under the name that the installed version has for it.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    found = importlib.util.find_spec("vllm")
    place = Path((found.submodule_search_locations or [""])[0]) if found else Path()
    newer = place / "entrypoints" / "launchers" / "api_server" / "entry.py"
    module = "launchers.api_server.entry" if newer.is_file() else "openai.api_server"
    return [sys.executable, "-m", f"vllm.entrypoints.{module}", "--model", model]


def first_cause(log: str) -> str:
    """Return the first error in vLLM's log that ended it, not what its other processes made of that; "" without one."""
    lines = [LOG_PREFIX.sub("", line, count=1).rstrip() for line in log.splitlines()]
    found = list(_exceptions(lines))
    own = [text for text in found if not any(wrapper in text for wrapper in WRAPPERS)]
    return next(iter(own or found), "")[:400]


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The last lines of tracebacks, and the usage errors of vLLM's command line."""
    in_traceback = False
    for number, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif re.match(r"^[\w.-]+: error: ", line):
            yield line.partition(": error: ")[2]
        elif in_traceback and line and not line.startswith(" ") and (match := EXCEPTION.match(line)):
            in_traceback = False
            kind, text = match.groups()
            if re.match(r"\d+ validation errors? for", text):  # pydantic says what is wrong in the line below
                text = lines[number + 1].strip().partition(" [type=")[0] if number + 1 < len(lines) else text
            yield f"{kind}: {text}" if text else kind


def served_dtype(config: Config, model: str) -> str:
    """Return the number format of server and trainer alike: as configured, or as the model was saved.

    What was saved in a format that vLLM does not compute in, such as float64, has float32. On a GPU it has 16 bits: vLLM's
    LoRA kernels take no others. Raises ConfigError where float32 is asked for there.
    """
    on_gpu = has_gpu()
    wanted = config.serving.dtype
    if wanted == "float32" and on_gpu:
        raise ConfigError(
            "config key serving.dtype has value 'float32', which vLLM's LoRA kernels do not take on a GPU; "
            'set it to "auto" or "bfloat16"'
        )
    if wanted != "auto":
        return wanted
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(model).dtype
    saved = str(dtype).removeprefix("torch.") if dtype is not None else "auto"
    if saved in ("bfloat16", "float16"):
        return saved
    if not on_gpu:
        return saved if saved == "auto" else "float32"
    card = read_card()
    return "float16" if card is not None and card.capability < 8 else "bfloat16"


def _free_port(wanted: int) -> int:
    with listen("serving.port", VLLM_HOST, wanted, otherwise=", or set 0 for any") as probe:
        return int(probe.getsockname()[1])
