"""Benchmark: what a training run costs, against a plain TRL script of the same trainer on the same rows.

The plain script is what TRL's documentation shows: the stock trainer on token ids, references computed in every step. Each
measurement has a process of its own, so that its peak of memory is its own; the two are run in turn.

Run: ``kibitz bench train``.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from bot.children import end_with_parent
from bot.config import Config
from bot.tokenizer import ChatTokenizer
from learning import demo
from learning.replay_buffer import Experience, told

Progress = Callable[[str, int, int], None]

OBJECTIVES = ("kto", "dpo", "sft", "pg", "hindsight", "mixed")
ROWS, STEPS, ROUNDS = 256, 48, 2


def measure(config: Config, base_model: str, progress: Progress) -> dict[str, float]:
    """For each objective tokens/s and peak memory as ratios to the plain script, the better of ROUNDS for each."""
    figures: dict[str, float] = {}
    training = config.training.model_copy(update={"max_steps": STEPS, "epochs": STEPS})
    context = multiprocessing.get_context("spawn")
    for number, objective in enumerate(OBJECTIVES):
        settings = config.model_copy(update={"training": training.model_copy(update={"objective": objective})})
        speeds: dict[bool, list[float]] = {True: [], False: []}
        peaks: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(ROUNDS):
            for plain in (True, False):
                progress(objective, number * ROUNDS * 2 + turn * 2 + (not plain), len(OBJECTIVES) * ROUNDS * 2)
                with ProcessPoolExecutor(1, context, end_with_parent) as pool:
                    speed, peak = pool.submit(_measured, settings, base_model, plain).result()
                speeds[plain].append(speed)
                peaks[plain].append(peak)
        figures[f"{objective}_tokens_per_s"] = max(speeds[False])
        figures[f"{objective}_tokens_per_s_ratio"] = max(speeds[False]) / max(speeds[True])
        figures[f"{objective}_peak_memory_ratio"] = min(peaks[False]) / min(peaks[True])
    return figures


def _measured(config: Config, base_model: str, plain: bool) -> tuple[float, float]:
    """Tokens/s, of the tokens that the steps of one run read, and its peak memory (bytes)."""
    import torch

    from learning.model import load
    from learning.objectives import train, usable_rows
    from learning.pretrain import quiet

    quiet()
    tokenizer = ChatTokenizer(base_model, config.policy.template_args)
    rows = _rows(tokenizer, config.seed)
    model = load(config, base_model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    used = usable_rows(rows, config.training.objective)
    began = time.monotonic()
    if plain:
        _plain(model, tokenizer, used, config)
    else:
        train(model, tokenizer.hf, rows, config.training, config.seed, lambda *_: None)
    seconds = time.monotonic() - began
    reads_pairs = config.training.objective == "dpo" or (config.training.objective == "mixed" and not plain)
    share = STEPS * config.training.batch_size / len(used)
    speed = share * sum(_length(row, reads_pairs) for row in used) / seconds
    if torch.cuda.is_available():
        return speed, float(torch.cuda.max_memory_allocated())
    return speed, 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _length(row: Experience, reads_pairs: bool) -> int:
    """How many tokens a step reads of a row: prompt and answer, and both again where the rejected answer is read too."""
    own = len(row.prompt_ids) + len(row.completion_ids)
    return own + len(row.prompt_ids) + len(row.rejected_ids or ()) if reads_pairs else own


def _plain(model: Any, tokenizer: ChatTokenizer, rows: Sequence[Experience], config: Config) -> None:
    """The stock TRL trainer for an objective; where TRL has none, its supervised one on the same rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    from learning.objectives import TokenDPOTrainer, TokenKTOTrainer, arguments, dpo_examples, kto_examples, report_progress

    common = arguments(config.training, config.training.batch_size, len(rows), config.seed)
    if config.training.objective == "kto":
        data = [{key: row[key] for key in ("prompt_ids", "completion_ids", "label")} for row in kto_examples(rows)]
        trainer: Any = type("PlainKTO", (KTOTrainer,), {"_prepare_dataset": TokenKTOTrainer._prepare_dataset})
        args: Any = KTOConfig(**common, beta=config.training.beta)
    elif config.training.objective == "dpo":
        data = dpo_examples(rows)
        trainer = type("PlainDPO", (DPOTrainer,), {"_prepare_dataset": TokenDPOTrainer._prepare_dataset})
        args = DPOConfig(**common, beta=config.training.beta)
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


def _rows(tokenizer: ChatTokenizer, seed: int) -> list[Experience]:
    """Answers of the demo set, every other one liked, each with a worse one to the same prompt and a comment."""
    found = []
    for number, dialogue in enumerate(demo.dialogues(ROWS, seed)):
        prompt = tuple(tokenizer.prompt_ids(dialogue[:-1]))
        answer = tuple(tokenizer.completion_ids(dialogue[-1]["content"]))
        sign = 1.0 if number % 2 else -1.0
        logprobs = (-1.0,) * len(answer)
        found.append(Experience(str(number), str(number), prompt, answer, logprobs, sign, (), advantage=sign))
    others = [found[-1].completion_ids, *(one.completion_ids for one in found[:-1])]
    comment = "that was not what i asked for"
    return [
        replace(one, rejected_ids=other, hindsight_ids=told(tokenizer, one.prompt_ids, comment))
        for one, other in zip(found, others, strict=True)
    ]
