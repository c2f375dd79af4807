"""Batching: fit a training run's batches into the free memory, and return the training arguments that follow.

`bot.models.memory_budget` does the arithmetic; this module asks torch how much memory is free.
"""

import os
from typing import Any

import torch
from accelerate import PartialState

from bot.accelerator import read_free_memory
from bot.config import TrainingConfig
from bot.models.memory_budget import (
    LEAST_PARALLEL_ANSWERS,
    BatchFit,
    count_parallel_answers,
    fit_batch,
    training_state_bytes,
)
from bot.models.shape import ModelShape, make_shape
from learning.models.ranks import broadcast_from_first

USABLE_SHARE = 0.9  # the share of the free memory that a run may count on


def find_usable_memory() -> int:
    """Return how many bytes this process may still use, of its GPU or of its share of main memory; 0 if unknown."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return read_free_memory() // int(os.environ.get("WORLD_SIZE", "1"))


def fit_to_machine(model: Any, training: TrainingConfig, batch: int, length: int) -> BatchFit:
    """Split batches of `batch` answers of up to `length` tokens into parts that fit into the memory that is free now.

    If by arithmetic not even the smallest part fits, the smallest is returned, to be tried.
    """
    shape = _shape(model)
    element = 2 if torch.cuda.is_available() else max(parameter.element_size() for parameter in model.parameters())
    found = find_usable_memory()
    left = int(USABLE_SHARE * found) - training_state_bytes(shape, training, element)
    fit = fit_batch(shape, training, batch, length, left, element) if found else BatchFit(batch, 1, False)
    if fit is None:
        fit = BatchFit(batch, 1, True)
        while fit.shrink().answers < fit.answers:
            fit = fit.shrink()
    if "RANK" in os.environ:  # all processes of a run must split alike, and this joins them if they are not yet
        PartialState(cpu=not torch.cuda.is_available())
    return broadcast_from_first(fit)


def count_samples_at_once(model: Any, tokens: int) -> int:
    """Return how many answers of `tokens` tokens, with their prompts, to sample at once.

    A few keep a CPU busy; on a GPU, the free memory decides.
    """
    if model.device.type != "cuda":
        return LEAST_PARALLEL_ANSWERS
    return count_parallel_answers(_shape(model), tokens, find_usable_memory(), model.dtype.itemsize)


def _shape(model: Any) -> ModelShape:
    return make_shape(model.config.to_dict(), sum(parameter.numel() for parameter in model.parameters()))


def machine_arguments(fit: BatchFit) -> dict[str, Any]:
    """Return the training arguments that depend on the machine, and those that suppress output and extra files."""
    on_gpu = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": fit.answers,
        "gradient_accumulation_steps": fit.accumulation_steps,
        "gradient_checkpointing": fit.gradient_checkpointing,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # otherwise a NaN loss is logged as the last finite one
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
