"""Hashes: tell whether the files of a model are still those that kibitz wrote.

Such a model needs no further checks. They import torch, which takes seconds and 400 MB.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

FILE = "sha256.json"


def write_hashes(directory: Path) -> None:
    """Write the hashes of a model's files into its directory. Nothing may be written there afterwards."""
    hashes = {file.name: compute_hash(file) for file in sorted(directory.iterdir())}
    (directory / FILE).write_text(json.dumps(hashes, indent=1))


def has_written_files(directory: Path) -> bool:
    """Tell whether a model's files have the hashes that they were written with; False for models of others.

    Raises PermissionError if one of them may not be read.
    """
    try:
        hashes = json.loads((directory / FILE).read_text())
        return bool(hashes) and all(compute_hash(directory / name) == wanted for name, wanted in hashes.items())
    except PermissionError:
        raise
    except (OSError, ValueError, AttributeError):
        return False


def compute_hash(file: Path) -> str:
    """Return the SHA-256 of a file, in hex digits. A file is read again only if it changed meanwhile."""
    found = file.stat()
    return _read_hash(file, found.st_ino, found.st_size, found.st_ctime_ns)


@cache
def _read_hash(file: Path, *version: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
