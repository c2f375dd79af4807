"""The commands as a person runs them: what they print, and one line with exit code 2 for every mistake.

Most run in this process, by the function that the console script calls; `kibitz` starts a process of its own.
"""

import asyncio
import contextlib
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Done, answered, react, refused, write_config

from bot.config import load
from bot.data_directory import lock_directory
from bot.errors import ConfigError
from bot.models.purpose import Purpose
from bot.output import interruptible
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry
from bot.store.users import Users
from bot.types import Conversation, Metrics
from learning.bench import simulated_people, simulation
from learning.training.choice import prepare_model
from learning.training.pretrain import DemoRecipe

INTERRUPTED = "kibitz: interrupted; all that was stored is kept, an unfinished training run left nothing behind"
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def kibitz(*arguments: object, stdin: str = "") -> Done:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "bot", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=900, env=ENV, cwd=ROOT)


def test_mistakes_in_the_config_and_on_the_command_line(tmp_path, demo_model, here):
    refused(here("status", "--config", tmp_path / "none.toml"), "cannot be read")
    config = write_config(tmp_path, demo_model, "sede = 1")
    refused(here("status", "--config", config), "'sede' is not known; did you mean 'seed'?")
    refused(here("status", "--data-dir", "/proc/nowhere"), "data_dir has value '/proc/nowhere'")
    refused(here("chat", "--config", write_config(tmp_path, "/no/model")), "policy.model has value '/no/model'")
    refused(here("chat", "--config", write_config(tmp_path, "nobody/nothing")), "policy.model has value 'nobody/nothing'")
    config = write_config(tmp_path, demo_model)
    refused(here("simulate", "--config", config, "--users", "nobody"), "--users has value 'nobody'")
    refused(here("simulate", "--config", config, "--json", "/no/where.json"), "there is no directory /no")
    refused(here("simulate", "--config", config, "--json", tmp_path), "it is a directory")
    refused(
        here("simulate", "--config", config, "--plot", "curve.foo"), "--plot has value 'curve.foo', which is not a PNG file"
    )
    refused(here("rollback", "--config", config), "kibitz policies")
    refused(here("train", "--config", config, "--progress", "x"), "'x' is not one of 'bar', 'json'")
    assert "bar|json" in here("train", "--help").stdout
    refused(here("dance"), "No such command")
    refused(kibitz("dance"), "No such command")  # the same at the console


def test_the_version_is_that_of_the_installed_package(here):
    done = here("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kibitz {importlib.metadata.version('kibitz')}\n", "")
    refused(here("--versoin"), "No such option: --versoin")


def test_users_of_a_file_must_give_a_number_between_minus_one_and_one(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    users = tmp_path / "users.py"
    users.write_text("def taste(prompt, reply): return 0")
    refused(here("simulate", "--config", config, "--users", users), "no function utility")
    for text, wanted in (
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("async def utility(prompt, reply): return 0", "no function utility"),
        ("def utility(prompt): return 0", "TypeError: utility() takes 1 positional argument"),
        ("def utility(prompt, reply): return 1 / len(reply)", "utility('hello', '') failed (ZeroDivisionError"),
        ("import sys\ndef utility(prompt, reply): sys.exit(0)", "SystemExit: 0"),
        ("def utility(prompt, reply): return 2", "returned 2; return a number in [-1, 1]"),
        ("def utility(prompt, reply): return float('nan')", "returned nan"),
        ("def utility(prompt, reply): pass", "returned None"),
    ):
        users.write_text(text)
        done = here("simulate", "--config", config, "--users", users)
        refused(done, wanted)
        assert not done.stdout, "nothing was started"


def test_users_of_a_file_may_give_a_number_of_numpys_and_import_what_lies_beside_it(tmp_path):
    (tmp_path / "taste_beside.py").write_text("import numpy\nliked = numpy.float32(0.5)")
    file = tmp_path / "people.py"
    file.write_text("from taste_beside import liked\ndef utility(prompt, reply): return liked")
    assert simulated_people.find_utility(str(file))("hello", "Hey!") == 0.5


def test_simulated_people_do_not_teach_a_policy_that_people_talk_with(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    assert here("status", "--config", config).returncode == 0
    database = Database(f"sqlite:///{tmp_path / 'data' / 'kibitz.db'}")
    store = ConversationStore(database)
    store.open_conversation(Conversation(simulation.PLATFORM, channel="1"))
    simulation.check_only_simulated(database)
    store.open_conversation(Conversation("discord", channel="1"))
    refused(here("simulate", "--config", config), "holds conversations of people (discord)")
    database.close()


def test_users_of_a_file_that_fail_later_are_told_as_well(tmp_path):
    users = tmp_path / "users.py"
    users.write_text("def utility(prompt, reply): return {'hello': 0.5}[prompt]")
    utility = simulated_people.find_utility(str(users))
    assert utility("hello", "Hi!") == 0.5
    with pytest.raises(ConfigError, match=r"utility\('bye', 'Hi!'\) failed \(KeyError: 'bye'\); fix it"):
        utility("bye", "Hi!")


def test_a_port_in_use_and_a_second_kibitz_are_refused(tmp_path, demo_model, here):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = write_config(tmp_path, demo_model)
        config.write_text(config.read_text() + f"[serving]\nport = {port}\n[web]\nport = 0\n")
        refused(here("serve", "--config", config), f"serving.port has value {port}, which is in use")
    with lock_directory(tmp_path / "data", "serve"):
        refused(here("serve", "--config", config), "is in use: another kibitz")


def test_a_replay_of_a_broken_or_useless_file_is_refused_and_stores_no_half_of_it(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    good = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    file = tmp_path / "file.jsonl"
    file.write_text(good + "\n{broken\n")
    refused(here("replay", file, "--config", config), "line 2 is not JSON")
    file.write_text(good + "\n" + good.replace("user", "robot") + "\n")
    refused(here("replay", file, "--config", config), "line 2 has the unknown role 'robot'")
    assert "messages: 0" in here("status", "--config", config).stdout
    file.write_text(good + "\n")
    refused(here("replay", file, "--config", config), "no usable reward: no answer has feedback")
    assert "messages: 0" in here("status", "--config", config).stdout
    refused(here("replay", file, "--config", config, "--format", "yaml"), "must be auto or one of kibitz, oasst")
    refused(here("export", tmp_path, "--config", config), "cannot be written (it is a directory)")
    refused(here("replay", "", "--config", config), "a path is empty")


def rated(count: int) -> str:
    rows = []
    for number in range(count):
        reply = "Hey there! 👋" if number % 2 else "Good day to you."
        said = [{"role": "user", "content": f"hello {number}"}, {"role": "assistant", "content": reply}]
        rows.append(json.dumps({"messages": said, "rating": bool(number % 2)}))
    return "\n".join(rows)


def test_a_replay_twice_gives_the_same_manifest_and_the_same_bytes(tmp_path, demo_model, here):
    file = tmp_path / "file.jsonl"
    file.write_text(rated(48) + '\n{"broken"\n{"hello": 1}\n')  # odd rows, which refuse nothing
    found = []
    for name, run in (("one", here), ("two", kibitz)):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, demo_model, "[learning]\ndistil_prompts = 4")
        out = tmp_path / f"{name}.json"
        plot = tmp_path / f"{name}.png"
        done = run("replay", file, "--config", config, "--json", out, "--plot", plot)
        assert done.returncode == 0, done.stderr
        assert plot.read_bytes().startswith(b"\x89PNG")
        found.append(json.loads(out.read_text()))
    assert set(found[0]) == {"name", "figures", "setup"}
    one, two = found[0]["figures"], found[1]["figures"]
    assert one == two
    assert (one["conversations"], one["approvals"], one["disapprovals"]) == (48, 24, 24)
    assert (one["format"], one["scale"]) == ("openai", "yes or no, in words")
    assert {"row that is not JSON": 1, "row that has no known format": 1}.items() <= one["dropped"].items()
    assert one["dropped_first"] == {"row that is not JSON": "line 49", "row that has no known format": "line 50"}
    assert one["trained_on"] + one["held_out"] == one["without_logprobs"] == 48
    assert one["held_out_accuracy_after"] >= one["held_out_accuracy_before"]
    assert one["held_out_margin_after"] > one["held_out_margin_before"]
    assert (one["head_auc"], one["length_and_logprob_auc"], one["length_alone_auc"]) == (1.0, 1.0, 0.0)
    assert len(one["manifest_sha256"]) == len(one["adapter_sha256"]) == 64
    listed = here("policies", "--config", tmp_path / "one" / "config.toml").stdout
    assert "policy-0" in listed
    assert one["policy"] in listed


def test_what_kibitz_exports_it_can_replay(tmp_path, store, registry, tokenizer, config, here):
    for number in range(24):
        reply = "Hey there!" if number % 2 == 0 else "Good night."  # opposite opinions of one text teach nothing
        react(store, answered(store, tokenizer, f"hello {number}", reply), approves=number % 2 == 0)
    config = config.model_copy(update={"learning": config.learning.model_copy(update={"distil_prompts": 0})})
    config.save(tmp_path / "config.json")
    done = here("export", tmp_path / "out.jsonl", "--config", tmp_path / "config.json")
    assert "conversations: 24" in done.stdout
    other = tmp_path / "other"
    out = tmp_path / "out.json"
    arguments = ("--config", tmp_path / "config.json", "--data-dir", other, "--json", out)
    assert here("replay", tmp_path / "out.jsonl", *arguments).returncode == 0
    figures = json.loads(out.read_text())["figures"]
    assert (figures["assistant_messages"], figures["without_logprobs"]) == (24, 0)


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_in_the_middle_of_a_run_leaves_nothing_half_written(tmp_path, demo_model, here, sign):
    file = tmp_path / "file.jsonl"
    file.write_text(rated(400))
    config = write_config(tmp_path, demo_model)
    command = [sys.executable, "-m", "bot", "replay", str(file), "--config", str(config), "--json", str(tmp_path / "o.json")]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    policies = tmp_path / "data" / "policies"
    deadline = time.monotonic() + 300
    while not list(policies.glob("*.unfinished")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(sign)
    _, said = child.communicate(timeout=300)
    assert child.returncode == 2
    assert "interrupted" in said
    assert "Traceback" not in said
    assert list(policies.iterdir()) == []
    assert not (tmp_path / "o.json").exists()
    assert "policy-1" in here("policies", "--config", config).stdout
    database = Database(f"sqlite:///{tmp_path / 'data' / 'kibitz.db'}")
    [run] = PolicyRegistry(database).list_runs()
    assert run["outcome"] == "interrupted"
    assert run["ended_at"] is not None
    database.close()


COMMAND = """
import atexit, os, signal, sys, typer
from bot.cli.main import main
signal.signal(signal.SIGINT, signal.HANDLER)
application = typer.Typer()
def wait(where):
    os.write(1, where)  # what print() was given stays where it is
    print(sys.stdin.readline(), end="")
@application.command()
def work():
    if WAITS_AT_ITS_END:
        atexit.register(wait, b"at its end\\n")
    wait(b"ready\\n")
main(application)
"""


def start_command(handler: str, *, waits_at_its_end: bool = False) -> subprocess.Popen[str]:
    """Start a command that waits for a line of input, with a handler of SIGINT, and wait until it waits."""
    code = COMMAND.replace("HANDLER", handler).replace("WAITS_AT_ITS_END", str(waits_at_its_end))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=ENV, cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
def test_sigterm_interrupts_every_command_even_one_that_ignores_ctrl_c(handler):
    with start_command(handler) as process:
        process.terminate()
        told = process.stderr.read()
        assert (process.wait(300), told.strip().splitlines()) == (2, [INTERRUPTED])


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_while_the_process_ends_ends_it_at_once_without_a_traceback(first, second):
    with start_command("default_int_handler", waits_at_its_end=True) as process:
        process.send_signal(first)
        assert process.stdout.readline() == "at its end\n"
        process.send_signal(second)
        told = process.stderr.read()
        assert (process.wait(300), told.strip().splitlines()) == (2, [INTERRUPTED])


def test_what_a_command_printed_is_there_whole_though_a_signal_ends_the_process_at_its_end():
    with start_command("default_int_handler", waits_at_its_end=True) as process:
        process.stdin.write("done\n")  # the command ends by itself
        process.stdin.flush()
        assert [process.stdout.readline(), process.stdout.readline()] == ["done\n", "at its end\n"]
        process.terminate()
        assert (process.stderr.read(), process.wait(300)) == ("", 0)


@pytest.mark.parametrize("module", ["typer", "sqlalchemy", "learning.rollout.loop"])
def test_ctrl_c_while_modules_are_loaded_ends_the_command_silently(module):
    code = (
        "import os, signal, sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from bot.cli.main import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, env=ENV, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    code = code.replace(module, "no such module")  # the control
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, env=ENV, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_that_a_library_lost_ends_the_work_at_the_next_step():
    told, before = [], signal.getsignal(signal.SIGINT)
    with interruptible(lambda *row: told.append(row)) as report:
        report("train", 1, 3)
        with contextlib.suppress(BaseException):  # as libraries do around their imports
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            report("train", 2, 3)
        signal.raise_signal(signal.SIGINT)  # a second one does not interrupt the removal of what is unfinished
    assert told == [("train", 1, 3)]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_was_killed_is_called_interrupted_unless_a_process_trains(tmp_path, registry, config, here):
    config.save(tmp_path / "config.json")
    version = registry.reserve(registry.get_live())
    run_id = registry.begin_run(version.name, {}, "hash", [])
    told = f"last run: {version.name}, trained on 0 reactions: "
    with lock_directory(config.data, "train"):
        assert f"{told}training" in here("status", "--config", tmp_path / "config.json").stdout
    assert f"{told}interrupted" in here("status", "--config", tmp_path / "config.json").stdout
    registry.end_run(run_id, "passed")
    assert f"{told}passed" in here("status", "--config", tmp_path / "config.json").stdout


def test_pretraining_on_ones_own_pairs_prints_measures_of_held_out_answers(tmp_path, demo_model, here):
    pairs = tmp_path / "pairs.jsonl"
    said = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    pairs.write_text("\n".join([json.dumps({"messages": said})] * 60))
    config = write_config(tmp_path, demo_model)
    out = tmp_path / "out.json"
    done = here("pretrain", pairs, "--config", config, "--json", out, "--epochs", 6)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())["figures"]
    assert (figures["pairs"], figures["held_out"]) == (54, 6)
    assert figures["perplexity"] < figures["perplexity_before"]
    assert figures["rouge_l"] == 100.0
    assert (tmp_path / "data" / "models" / "pretrained-pairs" / "config.json").exists()
    pairs.write_text(json.dumps({"messages": said}))
    refused(here("pretrain", pairs, "--config", config), "has 1 pair;")


@pytest.mark.slow
async def test_a_benchmark_leaves_the_operators_data_alone(live, tmp_path, demo_model):
    config = write_config(tmp_path, demo_model)
    config.write_text(f'{config.read_text()}[serving]\nurl = "{live.policy.admin.url}"\n[dialogue]\nembedder = "none"\n')
    command = ["bench", "overhead", "--model", demo_model, "--messages", 16, "--blocks", 1, "--config", config]
    command += ["--candidates", "2"]
    command += ["--json", tmp_path / "out.json"]
    done = await asyncio.to_thread(kibitz, *command)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["figures"]["candidates_2_throughput_ratio"] > 0
    assert "messages: 0" in kibitz("status", "--config", config).stdout
    apart = Database(f"sqlite:///{tmp_path / 'data' / 'bench' / 'serving' / 'kibitz.db'}")
    assert ConversationStore(apart).count_rows()["turns"] > 0
    apart.close()


def test_a_benchmark_that_serves_leaves_what_an_interrupted_one_of_learning_kept(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    config.write_text(f'{config.read_text()}[serving]\nurl = "http://127.0.0.1:9"\n[dialogue]\nembedder = "none"\n')
    kept, old = tmp_path / "data" / "bench" / "learning-ci.jsonl", tmp_path / "data" / "bench" / "serving" / "old"
    old.parent.mkdir(parents=True)
    for file in (kept, old):
        file.write_text("{}")
    refused(
        here("bench", "overhead", "--model", demo_model, "--config", config), "vLLM at http://127.0.0.1:9 does not answer"
    )
    assert kept.read_text() == "{}"
    assert not old.exists(), "the control: it begins with nothing of its own"
    for odd in ("4,0", "65", "many"):
        wanted = f"option --candidates has value '{odd.split(',')[-1]}'; give numbers from 1 to 64, such as 4,8"
        refused(here("bench", "overhead", "--candidates", odd, "--config", config), wanted)


def test_of_a_data_directory_where_nobody_talked_it_is_said_that_nothing_was_said(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    for command in (("export", tmp_path / "out.jsonl"), ("why", "some-turn")):
        refused(here(*command, "--config", config), "this data directory has no conversations yet")
    assert not (tmp_path / "out.jsonl").exists()


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("signals", "runner", "end"),
    [
        ([TERM], "run", "interrupted"),
        ([TERM], "run_until_stopped", "stopped"),
        ([INT], "run", "interrupted"),
        ([INT], "run_until_stopped", "interrupted"),
        ([TERM, TERM], "run", "interrupted"),
        ([TERM, TERM], "run_until_stopped", "interrupted"),
        ([TERM, INT], "run_until_stopped", "interrupted"),
        ([INT, TERM], "run_until_stopped", "interrupted"),
        ([INT, INT], "run_until_stopped", "interrupted"),
    ],
)
def test_sigterm_drains_and_a_second_one_ends_at_once(signals, runner, end):
    """What is there to be stopped, as `kibitz serve` is, was not interrupted by it, once it drained."""
    script = """
import asyncio, signal, sys
from bot.app import RUNNER
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
signal.signal(signal.SIGTERM, lambda *_: print("as before", flush=True))
async def main():
    goes_on = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, goes_on.set)
    try:
        print("ready", flush=True)
        await asyncio.Event().wait()
    finally:
        print("draining", flush=True)
        await goes_on.wait()
        print("drained", flush=True)
try:
    RUNNER(main())
    print("stopped", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
signal.raise_signal(signal.SIGTERM)
"""
    command = [sys.executable, "-c", script.replace("RUNNER", runner)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENV, cwd=ROOT, **pipes) as process:
        said = [process.stdout.readline()]
        for sign in signals:
            process.send_signal(sign)
            said.append(process.stdout.readline())
        if len(signals) == 1:
            process.stdin.write("what was under way is done\n")
            process.stdin.flush()
        said += process.stdout.readlines()
        assert process.wait(300) == 0
    drained = ["drained\n"] if len(signals) == 1 else []
    assert said == ["ready\n", "draining\n", *drained, f"{end}\n", "as before\n"], "the handlers are those of before"


@pytest.mark.parametrize("command", [pytest.param("chat", marks=pytest.mark.slow), "serve"])
def test_a_user_without_a_name_and_a_home_and_with_closed_streams_is_served_like_everybody(tmp_path, demo_model, command):
    """As far as a vLLM that is not there, with Slack's library, which looks for a home while it is imported."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import pwd\ndef getpwuid(uid): raise KeyError(uid)\npwd.getpwuid = getpwuid\n")
    config = write_config(tmp_path, demo_model)
    extra = '[serving]\nurl = "http://127.0.0.1:9/v1"\n[web]\nport = 0\n[dialogue]\nembedder = "none"\n'
    config.write_text(f'{config.read_text()}{extra}[slack]\nbot_token_env = "BOT"\napp_token_env = "APP"\n')
    environment = {
        name: value for name, value in ENV.items() if name not in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME")
    }
    environment |= {"PYTHONPATH": f"{site}:{ROOT}", "BOT": "xoxb-1", "APP": "xapp-1"}
    line = f"{shlex.join([sys.executable, '-m', 'bot', command, '--config', str(config)])} <&-"
    for streams in ("", " >&-"):
        done = subprocess.run(["bash", "-c", line + streams], capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.stderr.strip().splitlines() == [
            "kibitz: vLLM at http://127.0.0.1:9 does not answer (ClientConnectorError); check that it runs, and serving.url"
        ]
        assert done.returncode == 2
    assert (tmp_path / "data" / "home").is_dir()


async def test_a_chat_whose_input_is_closed_ends_as_one_whose_input_is_empty(live, tmp_path, demo_model):
    config = write_config(tmp_path, demo_model)
    config.write_text(config.read_text() + f'[serving]\nurl = "{live.policy.admin.url}/v1/"\n')
    line = f"{shlex.join([sys.executable, '-m', 'bot', 'chat', '--config', str(config)])} <&-"
    run = ["bash", "-c", line]
    done = await asyncio.to_thread(subprocess.run, run, capture_output=True, text=True, env=ENV, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_what_kibitz_writes_is_for_its_own_user(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    data = tmp_path / "data"
    here("status", "--config", config)
    assert not readable_by_others(data)
    for path in (data, data / "kibitz.db"):  # as earlier versions of kibitz left them
        path.chmod(0o755)
    (data / "policies").mkdir()
    (data / "policies").chmod(0o755)
    assert readable_by_others(data)
    here("status", "--config", config)
    assert not readable_by_others(data)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "notes.txt").write_text("somebody else's")
    for path in (shared, shared / "notes.txt"):  # whatever the umask of those who run the tests
        path.chmod(0o755)
    here("status", "--config", config, "--data-dir", shared)
    assert readable_by_others(shared) == [shared, shared / "notes.txt"], "what is not ours keeps its permissions"


def readable_by_others(directory: Path) -> list[Path]:
    return [path for path in sorted([directory, *directory.rglob("*")]) if path.stat().st_mode & 0o077]


def test_a_tilde_in_a_path_is_the_home_directory(tmp_path, demo_model, here, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    config = tmp_path / "home" / "config.toml"
    config.write_text('data_dir = "~/data"\n')
    assert here("status", "--config=~/config.toml").returncode == 0
    assert (tmp_path / "home" / "data" / "kibitz.db").is_file()
    assert here("status", "--data-dir=~/other").returncode == 0
    assert (tmp_path / "home" / "other" / "kibitz.db").is_file()
    refused(here("simulate", "--json=~/no/where.json", "--data-dir=~/other"), f"there is no directory {tmp_path}/home/no")
    refused(here("doctor", "--data-dir=~nobody-is-called-so/x"), "there is no such home directory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


@pytest.mark.parametrize("name", ["a?b=c", "100%", "a%20b", "#1", "a@b:c"])
def test_the_database_lies_in_the_data_directory_whatever_that_is_called(tmp_path, here, name):
    assert here("status", "--data-dir", tmp_path / name / "data").returncode == 0
    assert (tmp_path / name / "data" / "kibitz.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


async def test_a_scripted_chat_answers_reacts_and_explains(live, tmp_path, demo_model):
    """The terminal without a terminal, on the one vLLM of the run, given by its URL."""
    config = write_config(tmp_path, demo_model)
    config.write_text(config.read_text() + f'[serving]\nurl = "{live.policy.admin.url}"\n')
    lines = ["/good", "hello", "/good", "/why", "/regenerate", "/bad", "/undo", "/correct Hi!", "/correct", "/dance"]
    done = await asyncio.to_thread(kibitz, "chat", "--config", config, stdin="\n".join([*lines, "/status", "/quit"]) + "\n")
    assert done.returncode == 0, done.stderr
    said = done.stdout
    wanted = [
        *(
            "there is no answer yet",
            "kibitz: ",
            "noted (policy-0)",
            "answered by policy-0",
            "reward: +1.00 (the asker +1.00)",
        ),
        *("kibitz: ", "noted", "taken back", "noted", "say what the answer should have been", "there is no command /dance"),
        *("live: policy-0", "feedback: 7"),
    ]
    for part in wanted:
        assert part in said, said
        said = said[said.index(part) + len(part) :]


def test_in_a_copied_data_directory_only_its_own_files_are_pruned(tmp_path, registry, tmp_path_factory, here):
    version = registry.reserve(registry.get_live())
    Path(version.path).mkdir(parents=True)
    registry.reject(version.name)
    copy = shutil.copytree(tmp_path, tmp_path_factory.mktemp("other") / "copy")
    assert "removed the files of 1 rejected version" in here("prune", "--data-dir", copy).stdout
    assert list((copy / "policies").iterdir()) == []
    assert Path(version.path).is_dir()


def test_a_moved_data_directory_still_has_its_base_model(tmp_path, demo_model, tokenizer, here):
    before, after = tmp_path / "before", tmp_path / "after"
    toy = DemoRecipe().locate_model(before)
    shutil.copytree(demo_model, toy)
    with contextlib.closing(Database(f"sqlite:///{before / 'kibitz.db'}")) as database:
        database.upgrade()
        PolicyRegistry(database).ensure_base(str(toy))
        turn = answered(ConversationStore(database), tokenizer, "hello", "Hey there!")
    shutil.move(before, after)
    (tmp_path / "config.toml").write_text('[policy]\nmodel = "toy"\n')
    options = ("--data-dir", after, "--config", tmp_path / "config.toml")
    for command in (("export", tmp_path / "out"), ("why", turn.id)):
        done = here(*command, *options)
        assert done.returncode == 0, done.stderr
    (tmp_path / "config.toml").write_text(f'[policy]\nmodel = "{weightless(tmp_path / "another")}"\n')
    refused(here("export", tmp_path / "out", *options), f"this data directory's versions come from '{toy}'")


def weightless(directory: Path) -> Path:
    """A directory that is a base model by its config, without the weights of any."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def test_a_candidate_is_deployed_by_its_name_and_rejected_ones_are_pruned(tmp_path, config, registry, here):
    config.save(tmp_path / "config.json")
    options = ("--config", tmp_path / "config.json")

    def candidate() -> str:
        version = registry.reserve(registry.get_live())
        Path(version.path).mkdir(parents=True)
        (Path(version.path) / "samples.json").write_text("what somebody asked")
        return registry.complete(version.name, "hash", Metrics(judged_against=registry.get_live().name)).name

    wanted, outdated, rejected = candidate(), candidate(), candidate()
    refused(here("deploy", "policy-9", *options), "there is no policy version 'policy-9'; `kibitz policies` lists them all")
    done = here("deploy", wanted, *options)
    assert done.returncode == 0, done.stderr
    assert f"{wanted} will be probed when kibitz starts" in done.stdout
    assert [version.name for version in registry.find_requested()] == [wanted]
    registry.promote(wanted)
    refused(here("deploy", outdated, *options), f"was judged against policy-0, but {wanted} is live now; make a candidate")
    refused(here("deploy", wanted, *options), f"{wanted} is live: only a candidate can be deployed")
    registry.reject(rejected)
    assert "removed the files of 1 rejected version" in here("prune", *options).stdout
    assert not Path(registry.get(rejected).path).exists()
    assert Path(registry.get(wanted).path).exists()
    assert Path(registry.get(outdated).path).exists(), "a candidate may still be deployed"
    assert "removed the files of 0 rejected versions, 0.0 MB" in here("prune", *options).stdout


def test_an_output_file_takes_the_place_of_a_plain_file_and_of_nothing_else(tmp_path, registry, config, here):
    config.save(tmp_path / "config.json")
    pipe, plugged = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    options = ("--config", tmp_path / "config.json")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(plugged))
        for command in (("backup",), ("export",), ("simulate", "--json"), ("simulate", "--plot")):
            for one in (pipe, plugged):
                refused(here(*command, one, *options), "it is a device, a pipe or a socket")
            for one in (".", "/", tmp_path):
                refused(here(*command, one, *options), "it is a directory")
            refused(here(*command, "", *options), "a path is empty")
            refused(here(*command, "x" * 5000, *options), "cannot be used (File name too long)")
        for command in (("backup",), ("export",)):  # the name fits, and that of the unfinished file does not
            refused(here(*command, tmp_path / ("x" * 250), *options), "cannot be written (File name too long)")
    assert pipe.is_fifo()
    assert plugged.is_socket()
    assert not list(tmp_path.glob("*.unfinished"))
    plain = tmp_path / "plain"
    plain.write_text("an older export")
    assert here("export", plain, *options).returncode == 0, "the control"
    assert "kibitz-export" in plain.read_text()


@pytest.mark.parametrize("command", ["pretrain", "bench recall"])
def test_a_file_of_another_form_is_refused_with_the_form_that_is_wanted(tmp_path, demo_model, here, command):
    (tmp_path / "a.txt").write_text("so it goes")
    done = here(*command.split(), tmp_path / "a.txt", "--config", write_config(tmp_path, demo_model))
    refused(done, "line 1")
    assert "replay" not in done.stderr
    assert {"pretrain": "give JSON objects with 'messages'", "bench recall": "each line must be {"}[command] in done.stderr


def test_a_command_that_neither_samples_nor_trains_says_nothing_of_sampling_and_learning_rates(tmp_path, demo_model, here):
    other = shutil.copytree(demo_model, tmp_path / "another")
    config = write_config(tmp_path, str(other))
    done = here("fit-retrieval", "--from-feedback", "--config", config)
    refused(done, "too few judged answers remembered something: 0 in 0 conversations")
    assert "sampling" not in done.stdout
    assert "learning rate" not in done.stdout
    told: list[str] = []
    prepare_model(load(config), told.append, Purpose.TRAIN)
    assert [line.partition(":")[0] for line in told][:1] == ["sampling"], "the control"


def test_pretraining_removes_no_directory_that_holds_something_else_than_a_model(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    pairs, mine = tmp_path / "pairs.jsonl", tmp_path / "mine"
    said = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    pairs.write_text(json.dumps({"messages": said}))
    mine.mkdir()
    options = ("--config", config, "--out", mine)
    refused(here("pretrain", pairs, *options), "has 1 pair;")  # an empty one is taken
    (mine / "notes.txt").write_text("my only notes")
    refused(here("pretrain", pairs, *options), "the path exists and holds no model")
    refused(here("pretrain", pairs, "--config", config, "--out", pairs), "the path exists and holds no model")
    (mine / "config.json").write_text("{}")
    refused(here("pretrain", pairs, *options), "has 1 pair;")


@pytest.mark.parametrize("command", ["state", "why", "deploy", "report", "forget discord", "forget", "backup", "restore"])
def test_an_argument_that_is_no_text_is_refused_in_a_line(tmp_path, demo_model, here, command):
    odd = os.fsdecode(b"a\xffb")
    last = ("ann",) if command == "forget" else ()
    refused(here(*command.split(), odd, *last, "--data-dir", tmp_path), "the argument b'a\\xffb' is not UTF-8 text")


@pytest.mark.parametrize("command", ["restore", "replay", "pretrain", "bench recall", "status --config"])
def test_a_path_that_the_system_refuses_is_refused_in_a_line(tmp_path, here, command):
    refused(here(*command.split(), "x" * 5000, "--data-dir", tmp_path), "cannot be used (File name too long)")


def test_on_a_full_disk_a_command_goes_on_and_what_must_not_be_written_is_told(tmp_path, database, config, here):
    config.save(tmp_path / "config.json")
    options = ("--config", tmp_path / "config.json")
    witness = config.data / f".writable-{os.getpid()}"
    for command in (("status",), ("policies",), ("backup", tmp_path / "out")):
        witness.symlink_to("/dev/full")  # the real error of a full disk
        done = here(*command, *options)
        assert done.returncode == 0, done.stderr
        assert not witness.is_symlink()
    witness.symlink_to("/proc/version")  # the control: an error that is not that of a full disk
    refused(here("status", *options), "data_dir has value")


def test_only_somebody_who_is_known_can_be_forgotten(tmp_path, database, store, registry, tokenizer, config, here):
    turn = answered(store, tokenizer, "hello", "Hey there!", author="ann")
    react(store, turn, approves=True, user="bob")
    Users(database, config.privacy).record_consent("slack", "U1", consent=False)
    config.save(tmp_path / "config.json")
    options = ("--config", tmp_path / "config.json")
    for platform, user, wanted in (
        ("discrod", "ann", "there is no platform 'discrod'; write one of discord, slack, terminal, test, web"),
        ("Discord", "ann", "there is no platform 'Discord'"),
        ("test", "", "nobody on test has the id ''"),
        ("test", "cleo", "nobody on test has the id 'cleo', so nothing was forgotten"),
        ("web", "ann", "ids there are TOKEN-NAME/PERSON, such as local/ann"),
        ("discord", "ann", "ids there are numbers"),
    ):
        refused(here("forget", platform, user, *options), wanted)
    assert not (config.data / "erasures.txt").exists(), "nothing was noted"
    assert store.read_message(turn.message_id).text == "hello"
    for person in (("test", "bob"), ("test", "ann"), ("test", "ann"), ("slack", "U1")):
        assert here("forget", *person, *options).returncode == 0, person
    assert store.read_message(turn.message_id).text == ""
