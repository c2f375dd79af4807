"""Distillation: train the policy on its own answers, as a proven reward head judges them.

The policy answers each prompt several times. The advantage of an answer is how much more probably people like it than the
other answers to its prompt, so that answers which are all liked teach nothing. The steps follow the policy gradient with a
penalty for the distance from the base (`learning.training.weighted_trainer`). A group of answers to one prompt as its own
baseline: Ahmadian et al. (2024), "Back to Basics: Revisiting REINFORCE-Style Optimization", arXiv:2402.14740.

It depends neither on a database nor on a server.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bot.config import Config, TrainingConfig
from bot.memory.embedder import Embedder
from bot.models.tokenizer import ChatTokenizer
from learning.data.experience import Experience
from learning.data.feature_space import AnswerText, FeatureExtractor
from learning.judging.best_of_n import MANY_E_VALUE
from learning.judging.evaluation import batched_logprobs, generate, token_rows
from learning.judging.taught_head import find_peak_e_value, fit_head

if TYPE_CHECKING:
    from learning.models.trainable import Model

ANSWERS = 8  # to each prompt
STEPS = 15
BATCH_SIZE = 64
LEAST_ADVANTAGE = 0.01  # of the most different answers; Adam would make whole steps of rounding
RATE = 4.0  # times the learning rate: labels are many and agree with each other, so the steps may be larger


def is_proven(config: Config, taught: Sequence[Experience], embedder: Embedder | None) -> bool:
    """Whether a head that is fitted to these judged answers (oldest first) is or was proven, so that it may label others."""
    if not config.learning.distil_prompts:
        return False
    return find_peak_e_value(taught, FeatureExtractor(embedder), config.rewards.person_cap) >= MANY_E_VALUE


def make_labels(
    config: Config,
    model: "Model",
    tokenizer: ChatTokenizer,
    taught: Sequence[Experience],
    prompts: Sequence[Sequence[int]],
    embedder: Embedder | None,
) -> list[Experience]:
    """Have a model answer prompts, and return its answers with the advantages that a reward head gives them.

    The head is fitted to the judged answers `taught` (oldest first), which `is_proven` accepted. Returns nothing if the
    answers to each prompt are all alike to it.
    """
    extractor = FeatureExtractor(embedder)
    asked = [prompt for prompt in prompts[: config.learning.distil_prompts] for _ in range(ANSWERS)]
    samples = generate(model, tokenizer, asked, config.policy.max_tokens, config.seed, config.policy.truncation)
    logprobs = [tuple(row.tolist()) for row in batched_logprobs(model, token_rows(samples))]
    texts = [
        AnswerText(one.text, one.is_finished, float(np.mean(row)) if row else None)
        for one, row in zip(samples, logprobs, strict=True)
    ]
    head = fit_head(taught, texts, extractor, config.rewards.person_cap)
    if head is None:
        return []
    mean, _ = head.predict(extractor.extract(texts))
    chances = (1 / (1 + np.exp(-mean))).reshape(-1, ANSWERS)
    advantages = 2 * (chances - chances.mean(1, keepdims=True))
    if np.abs(advantages).max() < LEAST_ADVANTAGE:
        return []
    return [
        Experience(
            turn_id="",
            unit="",
            prompt_ids=one.prompt_ids,
            completion_ids=one.completion_ids,
            logprobs=row,
            reward=0.0,
            feedback_ids=(),
            answer=one.text,
            advantage=float(advantage),
        )
        for one, row, advantage in zip(samples, logprobs, advantages.ravel(), strict=True)
    ]


def choose_training(training: TrainingConfig) -> TrainingConfig:
    """Return the settings of the steps on labelled answers."""
    steps = {"objective": "pg", "batch_size": BATCH_SIZE, "max_steps": STEPS}
    rates = {name: RATE * getattr(training, name) for name in ("learning_rate", "full_learning_rate")}
    return training.model_copy(update=steps | rates)
