"""The data directory: make it, check that it can be written, close it to other users, and lock it."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import filelock

from bot.errors import ConfigError

HEALTH_FILE = "failing.json"  # the serving process's failing tasks (bot.supervision)
FULL = {errno.ENOSPC, errno.EDQUOT}
WITNESS = bytes(2**16)  # not empty, because a full disk still takes empty files
OWN_FILE_PATTERNS = (
    *("kibitz.db*", "policies", "doctor-*", "models", "embedders", "bench", "home", "cache", ".cache", ".triton"),
    *("vllm.log", "train-config.json", "erasures.txt", "config.toml", "*.lock", ".writable-*", HEALTH_FILE),
)


def prepare_directory(data: Path) -> None:
    """Make the directory, check that this user may write in it, and close it to other users.

    A full disk is no error, so that commands that only read still work. Raises ConfigError.
    """
    with _translate_os_errors(data):
        if not data.is_dir():
            data.mkdir(parents=True)
            data.chmod(0o700)
        try:
            _write_witness(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
    _make_private(data)


def check_directory_writable(data: Path) -> None:
    """Write a file in the directory and remove it. Raises ConfigError if that fails, for instance on a full disk."""
    with _translate_os_errors(data):
        _write_witness(data)


def _write_witness(data: Path) -> None:
    witness = data / f".writable-{os.getpid()}"
    try:
        witness.write_bytes(WITNESS)
    finally:
        witness.unlink(missing_ok=True)


@contextlib.contextmanager
def _translate_os_errors(data: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data_dir has value '{data}', which cannot be written ({error.strerror}); "
            "set another with data_dir in the config or --data-dir"
        ) from error


def _make_private(data: Path) -> None:
    """Remove the permissions of other users, also from files that earlier versions of kibitz wrote.

    The directory itself keeps its permissions if it has foreign files, because others may use it.
    """
    try:
        entries = list(data.iterdir())
    except OSError:  # we may write here but not list
        return
    ours = [entry for entry in entries if any(fnmatch(entry.name, pattern) for pattern in OWN_FILE_PATTERNS)]
    for path in [*ours, *([data] if len(ours) == len(entries) else [])]:
        with contextlib.suppress(OSError):  # it belongs to another user, or was just removed
            mode = path.stat().st_mode
            if mode & 0o077:
                path.chmod(stat.S_IMODE(mode) & ~0o077)


@contextlib.contextmanager
def lock_directory(data: Path, purpose: str) -> Iterator[None]:
    """Lock the directory for `purpose` ("serve", "train"), so that one process at a time does it.

    The kernel frees the lock if we die. Raises ConfigError if another process holds it.
    """
    prepare_directory(data)
    path = data / f"{purpose}.lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ConfigError(
            f"data_dir '{data}' is in use: another kibitz holds {path}; stop that one, or use another --data-dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(data: Path, purpose: str) -> bool:
    """Return whether a process holds the lock for `purpose` now."""
    if not (data / f"{purpose}.lock").exists():
        return False
    try:
        with filelock.FileLock(data / f"{purpose}.lock", timeout=0):
            return False
    except filelock.Timeout:
        return True
