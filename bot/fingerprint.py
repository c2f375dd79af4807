"""Fingerprint: tells base models apart by their weights, whatever their directories are called.

It reads a little of each tensor, so that a model of any size takes a moment.
"""

import hashlib
from pathlib import Path

from bot.model_shape import read_header

SAMPLE = 4096  # bytes, at the beginning, in the middle and at the end of each tensor


def fingerprint_model(model: str) -> str:
    """Return the sha256 of samples of all weights of the model in a directory; "" where there are none to read."""
    digest = hashlib.sha256()
    try:
        files = sorted(Path(model).glob("*.safetensors"))
        for file in files:
            tensors, start = read_header(file)
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
