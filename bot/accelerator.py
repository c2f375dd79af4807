"""Find this machine's GPU and its free memory.

Uses `nvidia-smi`, which comes with the driver, to avoid importing torch.
"""

import csv
import importlib.metadata
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
FIELDS = ("name", "memory.total", "memory.free", "compute_cap")
SMI_SECONDS = 20


@dataclass(frozen=True)
class Card:
    """One GPU, with its memory in bytes and its compute capability (bfloat16 needs 8.0)."""

    name: str
    total: int
    free: int
    capability: float = 9.0

    def __str__(self) -> str:
        return f"{self.name} ({self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free)"


def has_gpu() -> bool:
    """Return whether models run on a GPU: one exists, it is visible, and torch is built for it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    try:
        return "+cpu" not in importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False


def read_card() -> Card | None:
    """Return the first visible GPU, or None if there is none or `nvidia-smi` does not report it."""
    if not has_gpu():
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={first}", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_card(told)


def parse_card(told: str) -> Card | None:
    """Parse the first line of `nvidia-smi --query-gpu` (MiB). Return None if it has no numbers."""
    row = next(csv.reader(told.splitlines()), [])
    fields = [field.strip() for field in row]
    if len(fields) < 3 or not (fields[1].isdigit() and fields[2].isdigit()):
        return None
    capability = fields[3] if len(fields) > 3 and re.fullmatch(r"\d+\.\d+", fields[3]) else "9.0"
    return Card(fields[0], int(fields[1]) * 2**20, int(fields[2]) * 2**20, float(capability))


def read_free_memory() -> int:
    """Return how many bytes of main memory are available within the container's limit, or 0 if unknown."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M)
    except OSError:
        return 0
    available = int(found[1]) * 1024 if found else 0
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" means no limit
        used = int((group / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), flags=re.M)
        return min(available, limit - used + (int(cache[1]) if cache else 0))
    except (OSError, ValueError):
        return available
