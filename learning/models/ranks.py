"""Ranks: coordinate the processes of a training run. A single process is the first and only one."""

import os
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def is_first_process() -> bool:
    """Tell whether this process is the first of its training run, which reports and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def broadcast_from_first(decision: Any) -> Any:
    """Return the first process's `decision` in every process. A single process returns its own."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return decision
    told = [decision]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def share_dataset(dataset: "Dataset") -> "Dataset":
    """Load the first process's dataset from files in every process, so that all share its cache; alone, return it."""
    from datasets import load_from_disk

    if "RANK" not in os.environ:
        return dataset
    place = broadcast_from_first(tempfile.mkdtemp())
    if is_first_process():
        dataset.save_to_disk(place)
    broadcast_from_first(None)  # wait until it is saved
    return load_from_disk(place)


def count_processes() -> int:
    """Count the processes of this training run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def compute_batch_share(batch_size: int) -> int:
    """Return each process's share of a batch (answers, rounded up)."""
    return -(-batch_size // count_processes())
