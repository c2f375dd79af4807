"""Child processes: what works for the bot gives way to it, and does not outlive it.

It knows no command: whoever starts a child says what it is, and how nice.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from typing import Any

SERVING_NICENESS, TRAINING_NICENESS = 10, 19  # niceness: the bot itself first, then answers, then learning


def find_cores() -> set[int]:
    """The processor cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def find_spare_cores() -> set[int]:
    """All of them but one, which is left to the bot; the one where there is no other."""
    return find_cores() - {min(find_cores())} or find_cores()


def end_with_parent() -> None:
    """Have a process that begins ended with the one that started it, also where that is killed (on Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


async def start(*command: str, niceness: int, on: set[int] | None = None, **options: Any) -> asyncio.subprocess.Process:
    """Start a child in a process group of its own (Ctrl-C in the terminal is ours to pass on), `on` these cores.

    It stays in our session: where the kernel shares time between sessions first (`sched_autogroup_enabled`), niceness counts
    only inside one.
    """

    def as_our_child() -> None:
        os.nice(niceness)
        if on is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, on)
        if hasattr(os, "SCHED_BATCH"):  # Linux
            # What wakes of it does not push the bot aside. Some sandboxes refuse it: an eager child is better than none.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        end_with_parent()

    return await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, process_group=0, preexec_fn=as_our_child, **options
    )
