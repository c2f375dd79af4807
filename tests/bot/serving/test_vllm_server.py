"""vLLM as a child process: how it is started, and what is said where it does not start."""

import asyncio
import contextlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from bot import accelerator
from bot.accelerator import Card, parse_card
from bot.cli.doctor import check_vllm
from bot.config import Config, load
from bot.data_directory import lock_directory
from bot.errors import ConfigError, ServingError
from bot.models.dtype import choose_dtype
from bot.serving.policy import Policy
from bot.serving.vllm_arguments import check_extra_args, find_entry_point
from bot.serving.vllm_log import find_first_cause
from bot.serving.vllm_server import VllmServer
from learning.training.choice import prepare_model

# What the engine and the API server of vLLM 0.24 to 0.33 write where memory is short, shortened.
LOG = """\
(APIServer pid=7) INFO 11-26 10:00:00 [model.py:617] Resolved architecture: Qwen3ForCausalLM
(APIServer pid=7) WARNING 11-26 10:00:01 [utils.py:1] ImportError: flashinfer is not there, going on without it
(EngineCore pid=9) ERROR 11-26 10:00:09 [core.py:1108] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-26 10:00:09 [core.py:1108] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-26 10:00:09 [core.py:1108]   File "vllm/v1/engine/core.py", line 1082, in run_engine_core
(EngineCore pid=9) ERROR 11-26 10:00:09 [core.py:1108]     raise ValueError(
(EngineCore pid=9) ERROR 11-26 10:00:09 [core.py:1108] ValueError: Free memory on device cuda:0 (12.3/79.6 GiB) on \
startup is less than desired GPU memory utilization (0.92, 73.3 GiB).
(EngineCore pid=9) Traceback (most recent call last):
(EngineCore pid=9)   File "multiprocessing/process.py", line 314, in _bootstrap
(EngineCore pid=9) ValueError: Free memory on device cuda:0 (12.3/79.6 GiB) on startup is less than desired
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7)   File "vllm/v1/engine/utils.py", line 1166, in wait_for_engine_startup
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, card: Card | None) -> None:
    """What kibitz is told of the machine, as if it had a card: there is none where these tests run."""
    for module in ("models.dtype", "serving.vllm_arguments", "serving.vllm_server"):
        monkeypatch.setattr(f"bot.{module}.has_gpu", lambda: card is not None)
    for module in ("models.dtype", "serving.vllm_server"):
        monkeypatch.setattr(f"bot.{module}.read_card", lambda: card)


def make_server(config: Config) -> VllmServer:
    """Our own vLLM for the model of a config, not started."""
    return VllmServer(config.serving, config.policy, config.training, config.data, config.policy.model)


def test_of_vllms_errors_the_engines_own_is_quoted():
    cause = find_first_cause(LOG)
    assert cause.startswith("ValueError: Free memory on device cuda:0 (12.3/79.6 GiB)")
    last = find_first_cause(LOG.partition("(EngineCore pid=9)")[0] + LOG[LOG.index("(APIServer pid=7) Traceback") :])
    assert last.startswith("RuntimeError: Engine core initialization failed"), "the wrapper, where there is nothing else"
    assert find_first_cause("INFO: all is well") == ""
    assert (
        find_first_cause("api_server.py: error: unrecognized arguments: --nonsense") == "unrecognized arguments: --nonsense"
    )
    cut = "usage: vllm [-h]\nvllm: error: argument --max-num-seqs: expected one argument"
    assert find_first_cause(cut) == "argument --max-num-seqs: expected one argument"


@pytest.mark.slow
async def test_a_vllm_that_has_too_little_memory_says_so_in_one_line(config, monkeypatch):
    """The real vLLM, with no memory at all for what it keeps of each answer."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "0")
    server = make_server(config)
    policy = Policy(server.url, config.policy)
    try:
        with pytest.raises(ServingError) as error:
            await server.start(policy)
    finally:
        await policy.close()
        await server.stop()
    said = str(error.value)
    assert "Engine core initialization failed" not in said
    assert "No available memory for the cache blocks" in said
    assert "policy.context_tokens" in said
    assert "\n" not in said


def test_the_variables_of_cpus_are_set_on_cpus_alone(config, monkeypatch):
    server = make_server(config)
    of_cpus = {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"}
    for name in of_cpus:
        monkeypatch.delenv(name, raising=False)
        assert name in server._environment()
    assert "--enforce-eager" in server._command()
    on_a_gpu(monkeypatch, Card("H100", 80 * accelerator.GIB, 79 * accelerator.GIB))
    assert not of_cpus & set(server._environment())
    assert "--enforce-eager" not in server._command()


def test_the_share_of_the_gpu_is_vllms_setting(config, monkeypatch):
    serving = config.serving.model_copy(update={"memory_share": 0.4})
    server = make_server(config.model_copy(update={"serving": serving}))
    assert "--gpu-memory-utilization" not in server._command(), "on CPUs it would be a share of the main memory"
    on_a_gpu(monkeypatch, Card("H100", 80 * accelerator.GIB, 79 * accelerator.GIB))
    command = server._command()
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.4"


def test_on_a_gpu_a_model_that_was_saved_as_float32_is_served_in_16_bits(config, monkeypatch):
    assert choose_dtype(config.serving, config.policy.model) == "float32"
    on_a_gpu(monkeypatch, Card("H100", 80 * accelerator.GIB, 0, 9.0))
    assert choose_dtype(config.serving, config.policy.model) == "bfloat16"
    on_a_gpu(monkeypatch, Card("T4", 16 * accelerator.GIB, 0, 7.5))
    assert choose_dtype(config.serving, config.policy.model) == "float16", "it does not compute in bfloat16"
    asked = load(serving={"dtype": "float32"})
    with pytest.raises(ConfigError, match=r"serving.dtype has value 'float32'.*set it to"):
        choose_dtype(asked.serving, config.policy.model)
    on_a_gpu(monkeypatch, None)
    assert choose_dtype(asked.serving, config.policy.model) == "float32"


def test_a_model_that_was_saved_in_a_format_that_vllm_does_not_compute_in_is_served_as_float32(demo_model, tmp_path):
    model = Path(shutil.copytree(demo_model, tmp_path / "model"))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"dtype": "float64"}))
    assert choose_dtype(load().serving, str(model)) == "float32"
    (model / "config.json").write_text(json.dumps(settings | {"dtype": "float16"}))
    assert choose_dtype(load().serving, str(model)) == "float16", "the control"


@pytest.mark.parametrize("extra", [[], ["--nonsense"]])
async def test_extra_arguments_are_blamed_only_where_there_are_some(config, extra):
    """A process stands for a vLLM that cannot read its command line."""
    serving = config.serving.model_copy(update={"extra_args": extra})
    server = make_server(config.model_copy(update={"serving": serving}))
    code = "import sys; sys.stderr.write('vllm: error: argument --x: invalid\\n'); sys.exit(2)"
    server._command = lambda: [sys.executable, "-c", code]
    policy = Policy(server.url, config.policy)
    try:
        with pytest.raises(ServingError, match="vLLM says: argument --x: invalid") as error:
            await server.start(policy)
    finally:
        await policy.close()
        await server.stop()
    assert ("correct serving.extra_args" in str(error.value)) == bool(extra)


def test_the_entry_point_is_that_of_the_vllm_that_is_installed():
    command = find_entry_point("some/model")
    if any(one.metadata["Name"] == "vllm" for one in importlib.metadata.distributions()):
        assert command[2:] == ["vllm.entrypoints.cli.main", "serve", "some/model"]
    else:
        assert command[2:] == ["vllm.entrypoints.launchers.api_server.entry", "--model", "some/model"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--port", "1"], r"has --port, which kibitz sets itself; remove it, and set serving\.port$"),
        (["--port=1"], "has --port, which kibitz sets itself"),
        (["--max_model_len", "99"], r"has --max_model_len, .*; remove it, and set policy\.context_tokens"),
        (["--no-enable-lora"], "has --no-enable-lora, which kibitz sets itself; remove it$"),
        (["--enable-chunked-prefill"], "has --enable-chunked-prefill"),
        (["--max-num-seqs", "8", "--model", "x"], "has --model, .*; remove it, and set policy.model"),
        (["--gpu-memory-utilization=0.5"], "set serving.memory_share"),
        (["max-num-seqs=8"], "begins with 'max-num-seqs=8', which is no option"),
    ],
)
def test_what_kibitz_gives_vllm_itself_is_no_extra_argument(demo_model, tmp_path, arguments, wanted):
    config = load(data_dir=str(tmp_path), policy={"model": demo_model}, serving={"extra_args": arguments})
    with pytest.raises(ConfigError, match=wanted):
        prepare_model(config, lambda line: None)
    known = load(serving={"extra_args": ["--max-num-seqs", "8", "--seed=1"]})
    check_extra_args(known.serving, known.policy)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--nonsense", "1"], r"refuses \(unrecognized arguments: --nonsense"),
        pytest.param(["--max-num-seqs", "many"], r"refuses \(argument --max-num-seqs: .*many", marks=pytest.mark.slow),
    ],
)
def test_arguments_that_vllm_does_not_understand_are_told_in_its_own_words_without_a_start(arguments, wanted):
    with pytest.raises(ConfigError, match=wanted) as error:
        check_vllm(load(serving={"extra_args": arguments}))
    assert "\n" not in str(error.value)


def test_arguments_that_vllm_understands_pass():
    assert check_vllm(load(serving={"extra_args": ["--max-num-seqs", "8"]})).startswith("vllm")


@pytest.mark.slow
async def test_a_vllm_that_cannot_read_its_command_line_says_what_to_correct(config):
    serving = config.serving.model_copy(update={"extra_args": ["--nonsense"]})
    server = make_server(config.model_copy(update={"serving": serving}))
    policy = Policy(server.url, config.policy)
    try:
        with pytest.raises(ServingError, match=r"unrecognized arguments: --nonsense; correct serving\.extra_args"):
            await server.start(policy)
    finally:
        await policy.close()
        await server.stop()


async def test_a_restart_waits_for_a_run_that_holds_the_memory(config, monkeypatch):
    serving = config.serving.model_copy(update={"memory_share": 0.5})
    server = make_server(config.model_copy(update={"serving": serving}))
    said: list[str] = []
    await asyncio.wait_for(server.wait_for_memory(said.append), 5)
    with lock_directory(config.data, "train"):
        await asyncio.wait_for(server.wait_for_memory(said.append), 5)
        assert said == [], "there is no GPU: nobody waits"
        on_a_gpu(monkeypatch, Card("H100", 80 * accelerator.GIB, 50 * accelerator.GIB))
        await asyncio.wait_for(server.wait_for_memory(said.append), 5)
        assert said == [], "there is room for both"
        on_a_gpu(monkeypatch, Card("H100", 80 * accelerator.GIB, 30 * accelerator.GIB))
        waiting = asyncio.create_task(server.wait_for_memory(said.append))
        await asyncio.sleep(1.5)
        assert not waiting.done()
    await asyncio.wait_for(waiting, 5)
    assert said == ["vLLM waits for the training run: it needs 40.0 GiB of the GPU, 30.0 are free"]


def test_what_nvidia_smi_prints_is_read():
    assert parse_card("NVIDIA H100 80GB HBM3, 81559, 81000, 9.0\n") == Card(
        "NVIDIA H100 80GB HBM3", 81559 * 2**20, 81000 * 2**20, 9.0
    )
    assert parse_card("Tesla T4, 15360, 12, [N/A]") == Card("Tesla T4", 15360 * 2**20, 12 * 2**20)
    assert parse_card("No devices were found") is None
    assert parse_card("") is None


def test_main_memory_is_known_here():
    assert 0 < accelerator.read_free_memory() < 2**45
    assert not Path("/dev/nvidia0").exists() or accelerator.read_card()


ELSE = {
    "a page": ("text/html", "<html>\n<p>hello</p>\n</html>"),
    "JSON of something else": ("application/json", '{"object": "list"}'),
    "a list": ("application/json", "[]"),
    "a word": ("application/json", '"hello"'),
    "nothing": ("application/json", "null"),
    "models without names": ("application/json", '{"data": [{"name": "x"}]}'),
    "models that are words": ("application/json", '{"data": ["x"]}'),
    "choices that are words": ("application/json", '{"data": 1, "choices": ["x"]}'),
}


@contextlib.asynccontextmanager
async def always_says(config: Config, said: str, content_type: str) -> AsyncIterator[Policy]:
    """A server that answers whatever it is asked with the same, as if all were well, and who takes it for a vLLM."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=said, content_type=content_type)

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    policy = Policy(f"http://127.0.0.1:{runner.addresses[0][1]}", config.policy)
    try:
        yield policy
    finally:
        await policy.close()
        await runner.cleanup()


@pytest.mark.parametrize("kind", ELSE)
async def test_a_server_that_is_no_vllm_is_told_in_one_line(kind, config):
    content_type, said = ELSE[kind]
    quoted = " ".join(said.split()) if content_type == "text/html" else str(json.loads(said))
    async with always_says(config, said, content_type) as policy:
        for ask, path in (
            (policy.admin.connect, "/v1/models"),
            (policy.admin.list_adapters, "/v1/models"),
            (lambda: policy.admin.has_version("policy-1"), "/v1/models"),
            (lambda: policy.admin.read_next_logprobs(policy.admin.base, [1], 1.0), "/v1/completions"),
            (lambda: policy.admin.replace_weights("policy-1", "/some/path"), "/reset_prefix_cache"),
        ):
            with pytest.raises(ServingError, match=r"which is no answer from vLLM; check serving\.url") as error:
                await ask()
            assert str(error.value).startswith(f"{policy.admin.url}{path} returned '{quoted}'")
            assert "\n" not in str(error.value)
        policy.set_base(policy.admin.base)  # nothing was replaced
        assert await policy.admin.is_ready(300) == ("choices" in said)
        with pytest.raises(ServingError, match="policy-0 did not answer"):
            await policy.reply([1])


async def test_an_answer_in_pieces_that_are_none_of_vllms_is_told_in_one_line(config):
    async with always_says(config, 'data: {"choices": ["x"]}\n\n', "text/event-stream") as policy:
        with pytest.raises(ServingError, match="policy-0 did not answer"):
            await policy.reply([1])
