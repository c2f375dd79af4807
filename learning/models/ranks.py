"""Ranks: the processes that train together, as each of them sees it. Alone, one process is the first and only one."""

import os
import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def is_first() -> bool:
    """Whether this process speaks for all that train together."""
    return os.environ.get("RANK", "0") == "0"


def agreed(decision: Any) -> Any:
    """What the first of the processes that train together decided; alone, one's own decision."""
    import torch.distributed

    if not torch.distributed.is_initialized():
        return decision
    told = [decision]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def shared(dataset: "Dataset") -> "Dataset":
    """A dataset in a place where all that train together find it, and what is cached beside it; alone, as it is."""
    from datasets import load_from_disk

    if "RANK" not in os.environ:
        return dataset
    place = agreed(tempfile.mkdtemp())
    if is_first():
        dataset.save_to_disk(place)
    agreed(None)  # by then it is there
    return load_from_disk(place)


def count_processes() -> int:
    """Count the processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def share(batch_size: int) -> int:
    """How much of a batch is for each of the processes that train together."""
    return -(-batch_size // count_processes())
