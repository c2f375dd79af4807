"""Fingerprint: tells base models apart by their weights, whatever their directories are called.

It reads a little of each tensor, so that a model of any size takes a moment.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

SAMPLE = 4096  # bytes, at the beginning, in the middle and at the end of each tensor


def fingerprint_model(model: str) -> str:
    """Return the sha256 of samples of all weights of the model in a directory; "" where there are none to read."""
    digest = hashlib.sha256()
    try:
        files = sorted(Path(model).glob("*.safetensors"))
        for file in files:
            tensors, start = _read_header(file)
            with file.open("rb") as opened:
                for name in sorted(tensors):
                    begin, end = tensors[name]["data_offsets"]
                    digest.update(f"{name} {tensors[name]['dtype']} {tensors[name]['shape']}\n".encode())
                    for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                        opened.seek(start + offset)
                        digest.update(opened.read(min(SAMPLE, end - offset)))
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return digest.hexdigest() if files else ""


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Read what a safetensors file says of each tensor, and where its data begins. Raises ValueError where it is none."""
    with file.open("rb") as opened:
        start = opened.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= min(100_000_000, file.stat().st_size):
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(opened.read(size))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}, 8 + size
