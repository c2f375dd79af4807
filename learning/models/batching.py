"""Batching: how a training run reads its batches on this machine, so that they fit, and the arguments that follow.

`bot.models.memory_budget` does the arithmetic; this module asks torch how much memory is free. It knows no objective and no
rows.
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
    """Return how many bytes this process may still use: of its GPU, or its part of the main memory; 0 if nobody can tell."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return read_free_memory() // int(os.environ.get("WORLD_SIZE", "1"))


def fit_to_machine(model: Any, training: TrainingConfig, batch: int, length: int) -> BatchFit:
    """Choose how to read batches of so many answers of up to so many tokens in the memory that is free now.

    Where not even the smallest fits by arithmetic, that one is tried.
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
    if "RANK" in os.environ:  # what trains together must read its batches alike: its processes are joined by now
        PartialState(cpu=not torch.cuda.is_available())
    return broadcast_from_first(fit)


def count_samples_at_once(model: Any, tokens: int) -> int:
    """Count how many answers, of so many tokens with their prompts, to sample at once: processors are busy with few, a GPU
    takes what its memory holds.
    """
    if model.device.type != "cuda":
        return LEAST_PARALLEL_ANSWERS
    return count_parallel_answers(_shape(model), tokens, find_usable_memory(), model.dtype.itemsize)


def _shape(model: Any) -> ModelShape:
    return make_shape(model.config.to_dict(), sum(parameter.numel() for parameter in model.parameters()))


def machine_arguments(fit: BatchFit) -> dict[str, Any]:
    """Return the training arguments that depend on the machine, and those that keep a run quiet and without side files."""
    on_gpu = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": fit.answers,
        "gradient_accumulation_steps": fit.accumulation_steps,
        "gradient_checkpointing": fit.gradient_checkpointing,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # or a loss that is no number would be logged as the one before it
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
