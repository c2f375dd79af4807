"""vLLM's arguments: kibitz's own, and a check of those that an operator adds."""

import contextlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

from bot.accelerator import has_gpu
from bot.config import VLLM_HOST, PolicyConfig, ServingConfig
from bot.errors import ConfigError
from bot.serving import children
from bot.serving.vllm_log import find_first_cause
from bot.store.registry import BASE

# A program that parses vLLM's arguments. The parser's module differs between versions of vLLM; importing it is slow.
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


# The config key behind each option of vLLM that kibitz sets.
CONFIG_KEYS = {
    "--model": "policy.model",
    "--port": "serving.port",
    "--dtype": "serving.dtype",
    "--max-model-len": "policy.context_tokens and policy.max_tokens",
    "--gpu-memory-utilization": "serving.memory_share",
    "--max-loras": "serving.max_loras",
    "--max-lora-rank": "serving.max_lora_rank",
}
# vLLM computes in the process of its engine. "uni", the name for it, is ignored on CPUs, because vLLM cannot set the number
# of threads there; we set it (`VllmServer._environment`). A process less starts a quarter sooner and saves 0.7 GB.
IN_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
READ_AT_ONCE = 2048  # the least number of tokens that vLLM on CPUs reads at once


def list_own_options(serving: ServingConfig, policy: PolicyConfig) -> dict[str, str]:
    """Return the options of our own vLLM and their values ("" for a flag), without those that are chosen at its start."""
    longest = policy.context_tokens + policy.max_tokens
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
        # The CPU engine (0.32) ends when it reads a prompt in pieces and samples the answer with a seed.
        found |= {"--enforce-eager": "", "--no-enable-chunked-prefill": ""}
        found["--max-num-batched-tokens"] = str(max(longest, READ_AT_ONCE))
        found["--distributed-executor-backend"] = IN_PROCESS
    elif serving.memory_share:
        found["--gpu-memory-utilization"] = f"{serving.memory_share:g}"
    return found


def check_extra_args(serving: ServingConfig, policy: PolicyConfig) -> None:
    """Raise ConfigError if `serving.extra_args` has an option that kibitz sets itself."""

    def name(argument: str) -> str:
        return argument.partition("=")[0].replace("_", "-").replace("--no-", "--")

    first = next(iter(serving.extra_args), "-")
    if not first.startswith("-"):  # vLLM would take it for the name of a model
        raise ConfigError(f"config key serving.extra_args begins with '{first}', which is no option; begin with --OPTION")
    own = list_own_options(serving, policy)
    ours = {name(option) for option in ("--model", "--port", "--dtype", "--gpu-memory-utilization", *own)}
    for argument in serving.extra_args:
        if argument.startswith("--") and name(argument) in ours:
            key = CONFIG_KEYS.get(name(argument), "")
            raise ConfigError(
                f"config key serving.extra_args has {argument.partition('=')[0]}, which kibitz sets itself; remove it"
                + (f", and set {key}" if key else "")
            )


def check_extra_args_with_vllm(serving: ServingConfig) -> None:
    """Let the installed vLLM parse `serving.extra_args` (about 10 s), without a start. Raises ConfigError if it fails."""
    if not serving.extra_args:
        return
    command = [sys.executable, "-c", READ_ARGUMENTS, *serving.extra_args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=children.end_with_parent)
    if done.returncode != 0:
        cause = find_first_cause(done.stderr) or f"code {done.returncode}"
        raise ConfigError(f"config key serving.extra_args has a value that vLLM refuses ({cause}); correct it")


def find_entry_point(model: str) -> list[str]:
    """Return the command that starts vLLM's OpenAI server for a model.

    From 0.33 on this is `vllm serve`, as a module. That needs the metadata of a package named "vllm", which the CPU build
    lacks; there the command runs the server's own module, whose name depends on the version.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    found = importlib.util.find_spec("vllm")
    place = Path((found.submodule_search_locations or [""])[0]) if found else Path()
    newer = place / "entrypoints" / "launchers" / "api_server" / "entry.py"
    module = "launchers.api_server.entry" if newer.is_file() else "openai.api_server"
    return [sys.executable, "-m", f"vllm.entrypoints.{module}", "--model", model]
