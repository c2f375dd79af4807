"""Child processes do not outlive what started them, also where that is killed; they are told secrets by no file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import converse

from bot.config import load
from bot.conversations import ConversationStore
from bot.database import Database
from bot.registry import PolicyRegistry
from bot.tables import runs
from learning.loop import train_in_child

PARENT = """
import subprocess, sys, time
from bot.children import end_with_parent
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
    config = load(data_dir=str(tmp_path), policy=policy, training=training, gate=gate, database={"url": url})
    database = Database(config.database_url)
    database.upgrade()
    PolicyRegistry(database).ensure_base(demo_model)
    converse(ConversationStore(database), tokenizer, likes_emoji=True, count=48)
    outcome = await train_in_child(config, lambda stage, done, total: None, "--deploy")
    assert (tmp_path / "policies" / outcome["policy"] / "config.json").is_file()
    assert not (tmp_path / "kibitz.db").exists()
    with database.read() as connection:
        stored = connection.execute(sa.select(runs.c.config)).scalars().all()
    database.close()
    assert [row["seed"] for row in stored] == [config.seed]
    assert "hunter2" not in str(stored)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "train-config.json" in files
    assert [path for path in files if b"hunter2" in path.read_bytes()] == []
