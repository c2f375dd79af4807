"""Batching: how a training run reads its batches on this machine, so that they fit, and the arguments that follow.

`bot.models.memory_budget` does the arithmetic; this module asks torch how much memory is free. It knows no objective and no
rows.
"""

import os
from typing import Any

import torch
from accelerate import PartialState

from bot.accelerator import free_memory
from bot.config import TrainingConfig
from bot.models.memory_budget import SAMPLED, BatchFit, fit_batch, sampled_at_once, state_bytes
from bot.models.shape import ModelShape, shape_of
from learning.models.ranks import agreed

RESERVED = 0.9  # the share of the free memory that a run may count on


def room() -> int:
    """Return how many bytes this process may still use: of its GPU, or its part of the main memory; 0 if nobody can tell."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free_memory() // int(os.environ.get("WORLD_SIZE", "1"))


def fit_to_machine(model: Any, training: TrainingConfig, batch: int, length: int) -> BatchFit:
    """Choose how to read batches of so many answers of up to so many tokens in the memory that is free now.

    Where not even the smallest fits by arithmetic, that one is tried.
    """
    shape = _shape(model)
    element = 2 if torch.cuda.is_available() else max(parameter.element_size() for parameter in model.parameters())
    found = room()
    left = int(RESERVED * found) - state_bytes(shape, training, element)
    fit = fit_batch(shape, training, batch, length, left, element) if found else BatchFit(batch, 1, False)
    if fit is None:
        fit = BatchFit(batch, 1, True)
        while fit.smaller().answers < fit.answers:
            fit = fit.smaller()
    if "RANK" in os.environ:  # what trains together must read its batches alike: its processes are joined by now
        PartialState(cpu=not torch.cuda.is_available())
    return agreed(fit)


def samples_at_once(model: Any, tokens: int) -> int:
    """Count how many answers, of so many tokens with their prompts, to sample at once: processors are busy with few, a GPU
    takes what its memory holds.
    """
    if model.device.type != "cuda":
        return SAMPLED
    return sampled_at_once(_shape(model), tokens, room(), model.dtype.itemsize)


def _shape(model: Any) -> ModelShape:
    return shape_of(model.config.to_dict(), sum(parameter.numel() for parameter in model.parameters()))


def machine_arguments(fit: BatchFit) -> dict[str, Any]:
    """Return the training arguments that depend on the machine, and those that keep a run quiet and without side files."""
    on_gpu = torch.cuda.is_available()
    return {
        "per_device_train_batch_size": fit.answers,
        "gradient_accumulation_steps": fit.times,
        "gradient_checkpointing": fit.checkpointing,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # or a loss that is no number would be logged as the one before it
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
    }
