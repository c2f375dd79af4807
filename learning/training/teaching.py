"""Teaching: train a model in place on experiences, watched by a guard.

A training run, each of its processes if there are several, and `bench learning` use this code.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import sem

from bot.config import Config
from bot.errors import TrainingError
from bot.models.tokenizer import ChatTokenizer
from bot.types import Progress
from learning.data.experience import Experience
from learning.judging.evaluation import (
    Sample,
    batched_logprobs,
    generate,
    kl_to_base,
    means,
    next_logprobs,
    token_rows,
)
from learning.judging.gate import margin_interval
from learning.judging.metrics import Health, TrainingMetrics

if TYPE_CHECKING:
    from learning.models.trainable import Model

WATCHED = 16  # samples, and held-out answers liked and disliked, that the guard measures, at most


def train_with_guard(
    config: Config,
    model: "Model",
    tokenizer: ChatTokenizer,
    training: Sequence[Experience],
    held_out: Sequence[Experience],
    prompts: Sequence[Sequence[int]],
    progress: Progress,
    earlier: Sequence[Sample] = (),
) -> TrainingMetrics:
    """Train a model in place, watched by a Guard on held-out answers and on samples for the first of `prompts`.

    `earlier` are samples of the untrained model, if there are any. Raises TrainingError if its log-probabilities become NaN.
    """
    import torch
    from transformers import set_seed

    from learning.training.guard import Guard, Limits
    from learning.training.objectives import train

    liked, disliked = ([one for one in held_out if (one.reward > 0) == sign][:WATCHED] for sign in (True, False))
    watched = token_rows([*liked, *disliked])
    signs = np.array([1] * len(liked) + [-1] * len(disliked))
    start: list[np.ndarray] = []  # log-probabilities of the watched answers at the start (nats a token)

    def health() -> Health:
        with torch.random.fork_rng(devices):  # sampling here must not change the draws of the run
            told = batched_logprobs(model, watched)
            if not all(row.isfinite().all() for row in (*told, *next_logprobs(model, prompts[:WATCHED]))):
                # such a policy can be neither sampled nor measured
                raise TrainingError("the policy's log-probabilities became NaN; lower training.learning_rate")
            now = np.array(means(told))
            is_first = not start
            if is_first:
                start.append(now)
            samples = earlier[:WATCHED] if is_first else ()
            if not samples:
                asked = prompts[:WATCHED], config.policy.max_tokens, config.seed, config.policy.truncation
                samples = generate(model, tokenizer, *asked)
            return Health(
                liked=float(now[: len(liked)].mean()) if liked else None,
                kl=kl_to_base(model, samples),
                well_formed=sum(sample.is_well_formed for sample in samples),
                samples=len(samples),
                gained=margin_interval(now - start[0], signs, config.seed) if liked and disliked else None,
                liked_error=float(sem((now - start[0])[: len(liked)])) if len(liked) > 1 else 0.0,
            )

    devices = [model.device] if model.device.type == "cuda" else []
    set_seed(config.seed)
    guard = Guard(health, Limits(config.gate.kl_budget, config.gate.well_formed, config.policy.temperature))
    trained = train(model, tokenizer.hf, training, config.training, config.seed, progress, [guard])
    return trained | TrainingMetrics(stopped=guard.stopped, kept=guard.kept, checks=guard.checks)
