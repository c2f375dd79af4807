"""Child processes do not outlive what started them, also where that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
