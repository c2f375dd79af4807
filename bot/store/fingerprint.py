"""Fingerprints of base models: tell models apart by their weights, not by their directories.

Only a little of each tensor is read, so that a model of any size takes a moment.
"""

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

SAMPLE = 4096  # bytes read at the beginning, in the middle and at the end of each tensor
SLICES = 1024  # parts of a legacy pickle, whose tensors cannot be located
LOCAL_HEADER = 30  # bytes of a ZIP entry's header, before its name and extra field

Span = tuple[str, int, int]  # a tensor's name, and its begin and end in the file, in bytes


def fingerprint_model(model: str) -> str:
    """Return the sha256 of samples of all weights in a model's directory, or "" if there are none to read."""
    digest = hashlib.sha256()
    try:
        files = sorted(Path(model).glob("*.safetensors")) or sorted(Path(model).glob("pytorch_model*.bin"))
        for file in files:
            spans = _find_safetensors_spans(file) if file.suffix == ".safetensors" else _find_torch_spans(file)
            with file.open("rb") as opened:
                for name, begin, end in spans:
                    digest.update(f"{name}\n".encode())
                    for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                        opened.seek(offset)
                        digest.update(opened.read(min(SAMPLE, end - offset)))
    except (OSError, ValueError, LookupError, TypeError, struct.error, zipfile.BadZipFile):
        return ""
    return digest.hexdigest() if files else ""


def _find_safetensors_spans(file: Path) -> Iterator[Span]:
    """Yield the tensors of a safetensors file, from its header. Raises ValueError if it is not one."""
    with file.open("rb") as opened:
        start = opened.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= size <= min(100_000_000, file.stat().st_size):
            raise ValueError(f"{file.name} is not a safetensors file")
        header = json.loads(opened.read(size))
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = (8 + size + offset for offset in header[name]["data_offsets"])
        yield f"{name} {header[name]['dtype']} {header[name]['shape']}", begin, end


def _find_torch_spans(file: Path) -> Iterator[Span]:
    """Yield the tensors of a file that torch saved: the entries of an archive, or slices of a legacy pickle."""
    if not zipfile.is_zipfile(file):
        size = file.stat().st_size
        yield from ((f"{part} of {size}", size * part // SLICES, size * (part + 1) // SLICES) for part in range(SLICES))
        return
    with zipfile.ZipFile(file) as archive, file.open("rb") as opened:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            opened.seek(entry.header_offset + LOCAL_HEADER - 4)
            begin = entry.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", opened.read(4)))
            yield f"{entry.filename} {entry.file_size}", begin, begin + entry.compress_size
