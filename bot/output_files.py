"""Write output files, whole or not at all, and never over a directory, a device, a pipe or a socket."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bot.errors import DataError


def check_replaceable(path: Path) -> None:
    """Check that `path` is a plain file, or that one can be made there. Raises DataError otherwise."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        parent = path.absolute().parent
        if not parent.is_dir():
            raise _make_write_error(path, f"there is no directory {parent}") from None
        return
    except OSError as error:
        raise _make_write_error(path, error.strerror) from error
    if stat.S_ISDIR(mode):
        raise _make_write_error(path, "it is a directory")
    if not stat.S_ISREG(mode):
        raise _make_write_error(path, "it is a device, a pipe or a socket")


@contextmanager
def replace(path: Path) -> Iterator[Path]:
    """Yield a new file that only its owner may read. It replaces `path` at the end; on an error nothing changes.

    Raises DataError if the file cannot be written.
    """
    check_replaceable(path)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        raise _make_write_error(path, error.strerror) from error
    finally:
        with suppress(OSError):  # the name may be too long
            unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises DataError if it cannot be written."""
    with replace(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _make_write_error(path: Path, reason: str | None) -> DataError:
    return DataError(f"{path}: cannot be written ({reason}), nothing was changed; name another file")
