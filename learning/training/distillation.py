"""Distillation: train the policy on its own answers, as a proven reward head judges them.

The policy answers each prompt several times. The advantage of an answer is how much more probably people like it than the
other answers to its prompt, so that answers which are all liked teach nothing. An answer that is malformed, or that the base
would hardly give, counts as disliked: people judge few such answers, so the head cannot know what they think of it.

The steps follow the policy gradient with a penalty for the distance from the base (`learning.training.weighted_trainer`). A
group of answers to one prompt as its own baseline: Ahmadian et al. (2024), "Back to Basics: Revisiting REINFORCE-Style
Optimization", arXiv:2402.14740.

It depends neither on a database nor on a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bot.config import Config, TrainingConfig
from bot.memory.embedder import Embedder
from bot.models.tokenizer import ChatTokenizer
from learning.data.experience import Experience
from learning.data.feature_space import LIMIT, AnswerText, FeatureExtractor
from learning.judging.best_of_n import MANY_E_VALUE, PESSIMISM
from learning.judging.evaluation import Sample, batched_logprobs, generate, token_rows
from learning.judging.metrics import DistillationMetrics, TrainingMetrics
from learning.judging.taught_head import find_peak_e_value, fit_head
from learning.models.trainable import as_base, copy_weights, restore_weights

if TYPE_CHECKING:
    from learning.models.trainable import Model

LEAST_ROUNDS = 2  # of a run
STEPS = 5  # in a round, at most
EPOCHS = 2  # over the labels of a round, at most
BATCH_SIZE = 64
SIZE = 0.5  # standard deviation of the advantages
LARGEST_SCALE = 6.0  # of differences between probabilities
ANCHOR = 0.2  # times training.anchor
DECAY = 0.25  # times training.weight_decay
NEAR = 0.1  # times gate.kl_budget: nearer to the base there are more rounds, and further from it a larger penalty
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
LEAST_ADVANTAGE = 0.01  # of the most different answers; Adam would make whole steps of rounding


@dataclass(frozen=True)
class Labelling:
    """How labels are made: the answers to each prompt, the most rounds of a run, the standard deviations that are subtracted
    from a predicted log odds, and whether answers that are malformed, or that the base would hardly give, count as disliked.

    Answers of the policy as it is now teach more than further steps on older ones, so there is more than one round.
    """

    answers: int = 8
    rounds: int = 5
    pessimism: float = PESSIMISM
    doubts_unusual: bool = True


USUAL = Labelling()


def is_proven(config: Config, taught: Sequence[Experience], embedder: Embedder | None) -> bool:
    """Whether a head that is fitted to these judged answers (oldest first) is or was proven, so that it may label others."""
    if not config.learning.distil_prompts:
        return False
    extractor = FeatureExtractor(embedder)
    return find_peak_e_value(taught, extractor, config.rewards.person_cap, MANY_E_VALUE) >= MANY_E_VALUE


def label_answers(
    config: Config,
    model: "Model",
    tokenizer: ChatTokenizer,
    taught: Sequence[Experience],
    prompts: Sequence[tuple[int, ...]],
    extractor: FeatureExtractor,
    labelling: Labelling = USUAL,
) -> list[Experience]:
    """Have a model answer prompts, and return its answers with the advantages that a reward head gives them.

    The head is fitted to the judged answers `taught` (oldest first), which `is_proven` accepted. Returns nothing if the
    answers to each prompt are all alike to it.
    """
    asked = [prompt for prompt in prompts[: config.learning.distil_prompts] for _ in range(labelling.answers)]
    samples = generate(model, tokenizer, asked, config.policy.max_tokens, config.seed, config.policy.truncation)
    logprobs = [tuple(row.tolist()) for row in batched_logprobs(model, token_rows(samples))]
    texts = [
        AnswerText(one.text, one.is_finished, float(np.mean(row)) if row else None)
        for one, row in zip(samples, logprobs, strict=True)
    ]
    head = fit_head(taught, texts, extractor, config.rewards.person_cap)
    if head is None:
        return []
    chances = 1 / (1 + np.exp(-head.score(extractor.extract(texts), labelling.pessimism)))
    if labelling.doubts_unusual:
        chances = np.where([one.is_well_formed for one in samples] & _are_usual(model, samples), chances, 0.0)
    chances = chances.reshape(-1, labelling.answers)
    advantages = chances - chances.mean(1, keepdims=True)
    if np.abs(advantages).max() < LEAST_ADVANTAGE:
        return []
    # Of the same size in each round, so that the penalty does not outweigh them when answers become alike.
    advantages *= min(SIZE / float(advantages.std()), LARGEST_SCALE)
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


def order_prompts(judged: Sequence[Experience], unjudged: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the prompts to answer: those of `judged` answers (oldest first), the newest first, then the `unjudged` ones."""
    return [*dict.fromkeys([*(one.prompt_ids for one in reversed(judged)), *unjudged])]


def _rotate(prompts: Sequence[tuple[int, ...]], by: int) -> Sequence[tuple[int, ...]]:
    start = by % len(prompts) if prompts else 0
    return [*prompts[start:], *prompts[:start]]


def _are_usual(model: "Model", samples: Sequence[Sample]) -> np.ndarray:
    """Return whether the base gives each answer (n,) about as large a mean log-probability as it gives most of them."""
    with as_base(model):
        found = np.array([float(row.mean()) if len(row) else 0.0 for row in batched_logprobs(model, token_rows(samples))])
    away = found - np.median(found)
    return away >= -LIMIT * NORMAL * np.median(np.abs(away))


def distil(
    config: Config,
    model: "Model",
    tokenizer: ChatTokenizer,
    taught: Sequence[Experience],
    prompts: Sequence[tuple[int, ...]],
    embedder: Embedder | None,
    train: Callable[[Config, Sequence[Experience]], TrainingMetrics],
    labelling: Labelling = USUAL,
) -> DistillationMetrics:
    """Train a model in rounds, each on fresh answers of its own that a reward head judged.

    The head is fitted to the judged answers `taught` (oldest first), which `is_proven` accepted. `train` trains the model
    in place, as the config says. A round that the guard stops is the last.

    How far a round moves the policy depends on the taste. So the distance from the base decides how many rounds there are,
    and how large the penalty for it is, as in Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences",
    arXiv:1909.08593.
    """
    extractor = FeatureExtractor(embedder)  # one, so that no judged answer is embedded again in each round
    labels, rate, hold = 0, config.learning.distil_rate, 1.0
    for number in range(labelling.rounds):
        settings = config.model_copy(update={"seed": config.seed + number})
        asked = _rotate(prompts, number * config.learning.distil_prompts)  # other prompts than in the round before
        answers = label_answers(settings, model, tokenizer, taught, asked, extractor, labelling)
        if not answers:
            break
        labels += len(answers)
        trained, rate = _train_on_labels(settings, model, answers, train, rate, hold)
        if trained.stopped:
            return DistillationMetrics(labels=labels, labels_stopped=trained.stopped)
        kl = trained.checks[-1].kl if trained.checks else 0.0  # without a guard nobody measured it
        hold = max(1.0, kl / (NEAR * config.gate.kl_budget))
        if hold > 1 and number + 1 >= LEAST_ROUNDS:
            break
    return DistillationMetrics(labels=labels)


def _train_on_labels(
    config: Config,
    model: "Model",
    answers: Sequence[Experience],
    train: Callable[[Config, Sequence[Experience]], TrainingMetrics],
    rate: float,
    hold: float,
) -> tuple[TrainingMetrics, float]:
    """Train a model on labelled answers with the settings of `choose_training`, or at a lower `rate` if the guard takes the
    steps back. Returns the figures and the last rate.
    """
    before = copy_weights(model)
    for lowered in (rate, rate / 2, rate / 4):
        settings = config.model_copy(update={"training": choose_training(config.training, lowered, hold)})
        trained = train(settings, answers)
        if not trained.is_harmed:
            break
        restore_weights(model, before)
    return trained, lowered


def choose_training(training: TrainingConfig, rate: float, hold: float = 1.0) -> TrainingConfig:
    """Return the settings of the steps on labelled answers. `rate` is a factor of the learning rate, and `hold` one of the
    penalty for the distance from the base.

    Labels are many and agree with each other, so the steps are larger than with reactions, and less of them is taken back.
    """
    steps: dict[str, object] = {"objective": "pg", "batch_size": BATCH_SIZE, "epochs": EPOCHS, "max_steps": STEPS}
    rates = {name: rate * getattr(training, name) for name in ("learning_rate", "full_learning_rate")}
    holds = {"anchor": hold * ANCHOR * training.anchor, "weight_decay": DECAY * training.weight_decay}
    return training.model_copy(update=steps | rates | holds)
