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
child = subprocess.Popen(["sleep", "60"], preexec_fn=end_with_parent if sys.argv[1] == "ends" else None)
print(child.pid, flush=True)
time.sleep(60)
"""


def is_there(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("ends", [True, False])
def test_a_child_ends_with_a_parent_that_is_killed(ends):
    how = "ends" if ends else "stays"
    with subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_there(child)
        parent.kill()
    deadline = time.monotonic() + (10 if ends else 0.5)
    while is_there(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_there(child) != ends, "or, the control: without it, it goes on"
    if not ends:
        os.kill(child, signal.SIGKILL)
