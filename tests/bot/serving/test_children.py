"""Child processes do not outlive what started them, also where that is killed; they are told secrets by no file.

They import nothing from the directory in which kibitz was started.
"""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import converse, until

from bot.config import load
from bot.errors import ConfigError, TrainingError
from bot.models import architectures
from bot.serving import vllm_arguments, vllm_server
from bot.serving.children import worker_pool
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.registry import PolicyRegistry
from bot.store.tables import runs
from learning.rollout.loop import train_in_child
from learning.rollout.self_test import SelfTest
from learning.training import processes

PARENT = """
import subprocess, sys, time
from bot.serving.children import end_with_parent
child = subprocess.Popen(["sleep", "600"], preexec_fn=end_with_parent if sys.argv[1] == "ends" else None)
print(child.pid, flush=True)
time.sleep(600)
"""


def state_of(pid: int) -> list[str]:
    """State and parent of a process; nothing where it is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if state == "Z" else [state, parent]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("ends", [True, False])
def test_a_child_ends_with_a_parent_that_is_killed(ends):
    how = "ends" if ends else "stays"
    with subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert state_of(child)[1] == str(parent.pid)
        parent.kill()
    deadline = time.monotonic() + 300
    while state_of(child) and (ends or state_of(child)[1] == str(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert bool(state_of(child)) != ends, "or, the control: without it, it goes on with another parent"
    if not ends:
        os.kill(child, signal.SIGKILL)


async def test_a_training_process_finds_the_database_and_its_password_is_in_nothing_that_is_written(
    postgresql, tmp_path, demo_model, tokenizer
):
    """The server lets us in without a password; whether one is given to it makes no difference."""
    url = sa.make_url(postgresql()).set(password="hunter2").render_as_string(hide_password=False)
    policy, training, gate = {"model": demo_model}, {"max_steps": 6}, {"samples": 12}
    settings = {"policy": policy, "training": training, "gate": gate, "learning": {"distil_prompts": 0}}
    config = load(data_dir=str(tmp_path), database={"url": url}, **settings)
    database = Database(config.database_url, config.data)
    database.upgrade()
    PolicyRegistry(database).ensure_base(demo_model)
    converse(ConversationStore(database), tokenizer, likes_emoji=True, count=48)
    outcome = await train_in_child(config, lambda stage, done, total: None, "--deploy")
    assert (tmp_path / "policies" / outcome.policy / "config.json").is_file()
    assert not (tmp_path / "kibitz.db").exists()
    with database.read() as connection:
        stored = connection.execute(sa.select(runs.c.config)).scalars().all()
    database.close()
    assert [row["seed"] for row in stored] == [config.seed]
    assert "hunter2" not in str(stored)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "train-config.json" in files
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []


THEIRS = "the operator's own file runs"
USES_OURS = "import html, bot.serving.children, learning.training.processes"


@pytest.fixture
def _elsewhere(tmp_path, monkeypatch):
    """We stand where the operator keeps files that are named as what our children import."""
    place = tmp_path / "theirs"
    (place / "learning").mkdir(parents=True)
    for name in ("bot.py", "learning/__init__.py", "html.py", "pickle.py"):
        (place / name).write_text(f'raise SystemExit("{THEIRS}")')
    monkeypatch.chdir(place)


@pytest.mark.usefixtures("_elsewhere")
async def test_a_training_process_imports_nothing_from_where_kibitz_was_started(tmp_path):
    config = load(data_dir=str(tmp_path / "data"), policy={"model": "/no/model"})
    config.data.mkdir()
    with pytest.raises(TrainingError, match=r"policy\.model has value '/no/model'"):
        await train_in_child(config, lambda stage, done, total: None, "--deploy")


@pytest.mark.usefixtures("_elsewhere")
def test_the_step_of_the_doctor_imports_nothing_from_where_kibitz_was_started(tmp_path):
    config = load(data_dir=str(tmp_path / "data"))
    config.data.mkdir()
    with SelfTest(config, lambda: (config, "/no/model")) as found:
        found._model = "/no/model"
        with pytest.raises(TrainingError, match="/no/model"):
            found.check_step()


class Mark:
    """A directory is made when this is read from a file."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.mark.usefixtures("_elsewhere")
def test_processes_that_train_together_import_nothing_from_where_kibitz_was_started(tmp_path):
    """They read their job, which is none."""
    (tmp_path / "job").write_bytes(pickle.dumps(Mark(tmp_path / "read")))
    with pytest.raises(TrainingError, match="training in 1 processes failed"):
        processes._run_processes(tmp_path, 1, lambda stage, done, total: None)
    assert (tmp_path / "read").is_dir(), (tmp_path / "errors").read_text()


@pytest.mark.usefixtures("_elsewhere")
def test_what_asks_vllm_imports_nothing_from_where_kibitz_was_started(tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "read_vllm_table", lambda: {"another": ("module", "class")})
    config = load(data_dir=str(tmp_path), serving={"extra_args": ["--seed", "1"]})
    for program, is_sound in ((USES_OURS, True), (f"raise SystemExit({THEIRS!r})", False)):
        monkeypatch.setattr(architectures, "ASK_VLLM", program)
        monkeypatch.setattr(vllm_arguments, "READ_ARGUMENTS", program)
        assert architectures.can_serve("ours", "model") == is_sound
        if is_sound:
            vllm_arguments.check_extra_args_with_vllm(config.serving)
        else:
            with pytest.raises(ConfigError, match="vLLM refuses"):
                vllm_arguments.check_extra_args_with_vllm(config.serving)


@pytest.mark.usefixtures("_elsewhere")
def test_vllm_imports_nothing_from_where_kibitz_was_started(tmp_path, monkeypatch):
    """Nor do the processes that it starts, which inherit this."""
    config = load(data_dir=str(tmp_path))
    server = vllm_server.VllmServer(config.serving, config.policy, config.training, config.data, "model")
    run = [sys.executable, "-c", USES_OURS]
    assert subprocess.run(run, env=server._environment(), capture_output=True).returncode == 0
    unsafe = {name: value for name, value in server._environment().items() if name != "PYTHONSAFEPATH"}
    without = subprocess.run(run, env=unsafe, capture_output=True, text=True)
    assert without.stderr.strip() == THEIRS, "the control"


@pytest.mark.usefixtures("_elsewhere")
def test_the_processes_of_a_benchmark_import_nothing_from_where_kibitz_was_started():
    with worker_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()


async def test_the_processes_of_an_interrupted_benchmark_do_not_end_their_work_first():
    with pytest.raises(KeyboardInterrupt), worker_pool(1) as pool:
        pool.submit(signal.pause)  # it would never end
        children = multiprocessing.active_children()
        raise KeyboardInterrupt
    # the pool's own thread may be the one that the system tells of the end; it notes the exit code a moment later
    await until(lambda: all(child.exitcode is not None for child in children))
    assert [child.exitcode for child in children] == [-signal.SIGTERM]
