"""DataDirectory: the one place that kibitz writes to, shown to be writable and held by one serving process at a time.

It knows nothing of what is kept in it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from bot.errors import ConfigError

WITNESS = bytes(2**16)  # a full disk still takes empty files


def prepare(data: Path) -> None:
    """Make the directory, and show that it can be written before anything else is begun."""
    with _errors_for_people(data):
        data.mkdir(parents=True, exist_ok=True)
    check_writable(data)


def check_writable(data: Path) -> None:
    """Write a file in the directory and remove it. Raises ConfigError where that fails, for instance on a full disk."""
    witness = data / f".writable-{os.getpid()}"
    with _errors_for_people(data):
        try:
            witness.write_bytes(WITNESS)
        finally:
            witness.unlink(missing_ok=True)


@contextlib.contextmanager
def _errors_for_people(data: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data_dir has value '{data}', which cannot be written ({error.strerror}); "
            "give another with data_dir in the config or --data-dir"
        ) from error


@contextlib.contextmanager
def held(data: Path, purpose: str) -> Iterator[None]:
    """Hold the directory for `purpose` ("serve", "train"): one process at a time. The kernel frees it if we die."""
    prepare(data)
    path = data / f"{purpose}.lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(
            f"data_dir '{data}' is in use: another kibitz holds {path}; stop that one, or give another --data-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_held(data: Path, purpose: str) -> bool:
    """Whether some process holds the directory for `purpose` now."""
    if not (data / f"{purpose}.lock").exists():
        return False
    try:
        with filelock.FileLock(data / f"{purpose}.lock", timeout=0):
            return False
    except filelock.Timeout:
        return True
