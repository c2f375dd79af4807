"""Benchmark: compare the cost of training with a plain TRL script that uses the same trainer on the same rows.

The plain script is the one in TRL's documentation: the stock trainer on token ids, with references computed in every step.
Each measurement has a process of its own, so that its peak memory is its own. The two alternate.

Run: ``kibitz bench train``.
"""

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from bot.accelerator import has_gpu, read_card
from bot.config import Config, DatabaseConfig, TrainingConfig
from bot.models.shape import read_shape
from bot.models.tokenizer import ChatTokenizer
from bot.serving.children import worker_pool
from bot.store.stores import open_stores
from bot.types import Progress
from learning.data.experience import Experience
from learning.models import toy
from learning.training.pretrain import is_toy

OBJECTIVES = ("kto", "bco", "dpo", "sft", "pg", "mixed")


@dataclass(frozen=True)
class Size:
    """The size of a benchmark: rows, steps per run, and runs of each kind."""

    rows: int
    steps: int
    rounds: int


class Script(StrEnum):
    """What trains: TRL's stock trainer, or the trainer of kibitz."""

    PLAIN = "plain"
    OURS = "ours"


SIZE = Size(256, 48, 2)
ON_CPUS = Size(32, 4, 1)  # for models other than the toy, without a GPU
RATED = 96  # answers with an opinion for the one complete run
# Dense bfloat16 FLOP/s, from the manufacturers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "A10": 125e12, "3090": 71e12}


def measure(config: Config, base_model: str, progress: Progress) -> dict[str, float]:
    """Measure each objective's tokens/s and peak memory as ratios to the plain script, each from its best round."""
    figures: dict[str, float] = {}
    size = SIZE if is_toy(base_model) or has_gpu() else ON_CPUS
    training = config.training.model_copy(update={"max_steps": size.steps, "epochs": size.steps})
    for number, objective in enumerate(OBJECTIVES):
        settings = config.model_copy(update={"training": training.model_copy(update={"objective": objective})})
        speeds: dict[Script, list[float]] = {script: [] for script in Script}
        peaks: dict[Script, list[float]] = {script: [] for script in Script}
        for turn in range(size.rounds):
            for place, script in enumerate(Script):
                done = number * size.rounds * 2 + turn * 2 + place
                progress(objective, done, len(OBJECTIVES) * size.rounds * 2)
                with worker_pool(1) as pool:
                    speed, used = pool.submit(_measure_run, settings, base_model, script, size).result()
                speeds[script].append(speed)
                peaks[script].append(used)
        figures[f"{objective}_tokens_per_s"] = max(speeds[Script.OURS])
        figures[f"{objective}_tokens_per_s_ratio"] = max(speeds[Script.OURS]) / max(speeds[Script.PLAIN])
        figures[f"{objective}_peak_memory_ratio"] = min(peaks[Script.OURS]) / min(peaks[Script.PLAIN])
    progress("one whole run", 0, 1)
    with worker_pool(1) as pool:
        figures["steps_share_of_run"] = pool.submit(_measure_steps_share, config, base_model).result()
    if (peak := _find_peak_flops()) is not None:
        parameters = read_shape(base_model).parameters
        for objective in OBJECTIVES:  # 4 · parameters FLOP a token: an adapter needs no gradients of the base's weights
            figures[f"{objective}_share_of_peak"] = 4 * parameters * figures[f"{objective}_tokens_per_s"] / peak
    return figures


def _measure_steps_share(config: Config, base_model: str) -> float:
    """Return the share of a complete run, from reading the feedback to the verdict, that is spent in training steps."""
    from learning.importers import formats
    from learning.training.run import train_version

    place = Path(tempfile.mkdtemp(prefix="bench-", dir=config.data))
    try:
        apart = config.model_copy(update={"data_dir": str(place), "database": DatabaseConfig()})
        rated = place / "rated.jsonl"
        rows = [
            json.dumps({"messages": dialogue, "rating": bool(number % 2)})
            for number, dialogue in enumerate(toy.make_dialogues(RATED, config.seed))
        ]
        rated.write_text("\n".join(rows), encoding="utf-8")
        recording = formats.read_recording(rated, "openai")
        database, store, registry = open_stores(apart)
        registry.ensure_base(base_model)
        store.add_dialogues(recording.dialogues)
        database.close()
        outcome = train_version(apart, lambda *_: None, space=recording.space)
        return outcome.figures.steps_share_of_run
    finally:
        shutil.rmtree(place)


def _find_peak_flops() -> float | None:
    """Return the GPU's bfloat16 peak (FLOP/s, dense) by its name, or None without a known GPU."""
    card = read_card()
    return None if card is None else next((peak for name, peak in PEAKS.items() if name in card.name), None)


def _measure_run(config: Config, base_model: str, script: Script, size: Size) -> tuple[float, float]:
    """Train once, and return the tokens/s that the steps read, and the peak memory (bytes)."""
    import torch

    from learning.data.selection import select_usable
    from learning.models.trainable import load_for_training, silence_libraries
    from learning.training.objectives import train

    silence_libraries()
    tokenizer = ChatTokenizer(base_model, config.policy.template_args)
    rows = _rows(tokenizer, size.rows, config.seed)
    model = load_for_training(config.policy, config.serving, config.training, base_model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    used = select_usable(rows, config.training.objective)
    began = time.monotonic()
    if script == Script.PLAIN:
        _train_plain(model, tokenizer, used, config.training, config.seed)
    else:
        train(model, tokenizer.hf, rows, config.training, config.seed, lambda *_: None)
    seconds = time.monotonic() - began
    objective = config.training.objective
    reads_pairs = objective == "dpo" or (objective == "mixed" and script == Script.OURS)
    count = _count_pair_tokens if reads_pairs else _count_tokens
    share = size.steps * config.training.batch_size / len(used)
    speed = share * sum(map(count, used)) / seconds
    if torch.cuda.is_available():
        return speed, float(torch.cuda.max_memory_allocated())
    return speed, 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _count_tokens(row: Experience) -> int:
    """Count the tokens that a step reads of a row: prompt and answer."""
    return len(row.prompt_ids) + len(row.completion_ids)


def _count_pair_tokens(row: Experience) -> int:
    """Count the tokens that a step reads of a pair: prompt and answer, and the prompt and rejected answer."""
    return _count_tokens(row) + len(row.prompt_ids) + len(row.rejected_ids or ())


def _train_plain(
    model: Any, tokenizer: ChatTokenizer, rows: Sequence[Experience], training: TrainingConfig, seed: int
) -> None:
    """Train with TRL's stock trainer for the objective, or with its SFTTrainer if TRL has none, on the same rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    from learning.models.reporter import report_progress
    from learning.training.objectives import make_training_arguments
    from learning.training.token_trainers import TokenDPOTrainer, TokenKTOTrainer, dpo_examples, kto_examples

    common = make_training_arguments(training, training.batch_size, len(rows), seed)
    if training.objective == "kto":
        data = [{key: row[key] for key in ("prompt_ids", "completion_ids", "label")} for row in kto_examples(rows)]
        trainer: Any = type("PlainKTO", (KTOTrainer,), {"_prepare_dataset": TokenKTOTrainer._prepare_dataset})
        args: Any = KTOConfig(**common, beta=training.beta)
    elif training.objective == "dpo":
        data = dpo_examples(rows)
        trainer = type("PlainDPO", (DPOTrainer,), {"_prepare_dataset": TokenDPOTrainer._prepare_dataset})
        args = DPOConfig(**common, beta=training.beta)
    else:
        data = [
            {
                "input_ids": [*row.prompt_ids, *row.completion_ids],
                "labels": [-100] * len(row.prompt_ids) + [*row.completion_ids],
            }
            for row in rows
        ]
        trainer = SFTTrainer
        args = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
    made = trainer(model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer.hf)
    report_progress(made, "plain", lambda *_: None)
    made.train()


def _rows(tokenizer: ChatTokenizer, count: int, seed: int) -> list[Experience]:
    """Make experiences from the toy dialogues: every other answer is liked, and each has a rejected one beside it."""
    found = []
    for number, dialogue in enumerate(toy.make_dialogues(count, seed)):
        prompt = tuple(tokenizer.prompt_ids(dialogue[:-1]))
        answer = tuple(tokenizer.completion_ids(dialogue[-1]["content"]))
        sign = 1.0 if number % 2 else -1.0
        logprobs = (-1.0,) * len(answer)
        found.append(Experience(str(number), str(number), prompt, answer, logprobs, sign, (), advantage=sign))
    others = [found[-1].completion_ids, *(one.completion_ids for one in found[:-1])]
    return [replace(one, rejected_ids=other) for one, other in zip(found, others, strict=True)]
