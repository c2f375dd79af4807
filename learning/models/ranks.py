"""Ranks: the processes that train together, as each of them sees it. Alone, one process is the first and only one."""

import os
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def is_first_process() -> bool:
    """Whether this process speaks for all that train together."""
    return os.environ.get("RANK", "0") == "0"


def broadcast_from_first(decision: Any) -> Any:
    """What the first of the processes that train together decided; alone, one's own decision."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return decision
    told = [decision]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def share_dataset(dataset: "Dataset") -> "Dataset":
    """A dataset in a place where all that train together find it, and what is cached beside it; alone, as it is."""
    from datasets import load_from_disk

    if "RANK" not in os.environ:
        return dataset
    place = broadcast_from_first(tempfile.mkdtemp())
    if is_first_process():
        dataset.save_to_disk(place)
    broadcast_from_first(None)  # by then it is there
    return load_from_disk(place)


def count_processes() -> int:
    """Count the processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def compute_batch_share(batch_size: int) -> int:
    """How much of a batch is for each of the processes that train together."""
    return -(-batch_size // count_processes())
