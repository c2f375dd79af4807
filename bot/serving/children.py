"""Child processes: start them with a lower priority than the bot, and end them with it."""

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

SERVING_NICENESS, TRAINING_NICENESS = 10, 19  # the bot (0) comes first, then answers, then learning


def find_cores() -> set[int]:
    """Return the processor cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def find_spare_cores() -> set[int]:
    """Return these cores without one, which is left to the bot; the only one if there is no other."""
    return find_cores() - {min(find_cores())} or find_cores()


def end_with_parent() -> None:
    """End this process when its parent ends, even if the parent is killed (on Linux). Call it in the new process."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


async def start(*command: str, niceness: int, on: set[int] | None = None, **options: Any) -> asyncio.subprocess.Process:
    """Start a child on the cores `on`, in its own process group, so that Ctrl-C in the terminal reaches only the bot.

    It stays in the bot's session: a kernel that shares time between sessions first (`sched_autogroup_enabled`) respects
    niceness only within one.
    """

    def as_our_child() -> None:
        os.nice(niceness)
        if on is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, on)
        if hasattr(os, "SCHED_BATCH"):  # Linux
            # A batch process that wakes does not preempt the bot. Some sandboxes refuse this; then do without it.
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        end_with_parent()

    return await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, process_group=0, preexec_fn=as_our_child, **options
    )


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes. If the body fails or is interrupted, they are ended in the middle of their work."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
