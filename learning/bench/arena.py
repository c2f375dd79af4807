"""Arena: a policy, simulated people who react to its answers, and its judgement by their hidden utility.

The slices of ``kibitz bench learning`` share it. People talk to the policy, give 👍 or 👎, and regenerate some answers that
they do not like. It is trained by the code that trains in production, and answers from then on. Its score is the true
utility of its answers to held-out prompts, against those of version 0. There is no gate, because it would hide
what training does.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bot.config import Config
from bot.memory.embedder import make_embedder
from bot.models.tokenizer import ChatTokenizer
from learning.bench.simulated_people import Prompts, Utility
from learning.data.comparison import with_advantages
from learning.data.experience import Experience
from learning.data.selection import split_held_out
from learning.judging.evaluation import Rows, Sample, batched_logprobs, generate, kl_to_base, perplexity, token_rows
from learning.judging.metrics import TrainingMetrics
from learning.models import toy
from learning.models.trainable import as_base, copy_weights, load_for_training, restore_weights, silence_libraries
from learning.training.demonstrations import prefer_to_own_answers
from learning.training.distillation import distil, is_proven, order_prompts
from learning.training.drift import detect_drift
from learning.training.pretrain import is_toy
from learning.training.teaching import train_with_guard

SAMPLES_PER_PROMPT = 4  # answers to each held-out prompt
SAMPLES_AT_ONCE = 64
REGENERATES = 0.5  # the share of disliked answers that are regenerated
MakeFurther = Callable[[Config, Any, ChatTokenizer, Sequence[Experience]], list[Experience]]


@dataclass(frozen=True)
class ReactingPeople:
    """Simulated people: their hidden utility, the share of mistaken reactions, and the share of answers they react to."""

    utility: Utility
    noise: float
    rate: float
    rng: random.Random

    def give_opinion(self, prompt: str, text: str) -> bool | None:
        """Return True for 👍, False for 👎, or None for no reaction."""
        if self.rng.random() >= self.rate:
            return None
        worth = self.utility(prompt, text)
        likes = worth > 0 if worth else self.rng.random() < 0.5
        return likes != (self.rng.random() < self.noise)


@dataclass(frozen=True)
class Point:
    """The scores of a policy on held-out prompts after a number of reactions."""

    reactions: int
    win_rate: float
    win_rate_ties_half: float
    utility: float
    well_formed: float
    perplexity_ratio: float
    kl: float
    stopped: bool
    drifted: bool


@dataclass(frozen=True)
class RunEnd:
    """How a training run ended: whether the guard stopped it, and whether a change of taste was detected."""

    stopped: bool = False
    drifted: bool = False


class Arena:
    """The policy in training, the held-out prompts with version 0's answers, and texts to measure perplexity on.

    These texts are dialogues as the toy was made of, or version 0's answers if the policy is another model.
    """

    def __init__(self, config: Config, base_model: str, seed: int, prompts: Prompts):
        self.config = config
        self.seed = seed
        self.base_model = base_model
        self.tokenizer = ChatTokenizer(base_model, config.policy.template_args)
        self.embedder = make_embedder(config.dialogue, config.data)
        self.said = prompts.said
        self.prompts = [text for text in prompts.held_out for _ in range(SAMPLES_PER_PROMPT)]
        self.model = load_for_training(config.policy, config.serving, config.training, base_model)
        self.start = copy_weights(self.model)
        self.since = 0  # the first reaction that the policy learns from
        with as_base(self.model):
            self.first = self.generate_answers(self.prompts, self.seed)
            self.untouched = self._tokenize_dialogues() if is_toy(base_model) else token_rows(self.first)
            self.perplexity = self._perplexity()

    def tokenize_prompt(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.prompt_ids([{"role": "user", "content": text}]))

    def judge_policy(self, reactions: int, utility: Utility, run: RunEnd) -> Point:
        """Score the current policy against version 0. `run` is the end of its last training run."""
        said = self.generate_answers(self.prompts, self.seed + reactions)
        mine = np.array([utility(prompt, one.text) for prompt, one in zip(self.prompts, said, strict=True)])
        first = np.array([utility(prompt, one.text) for prompt, one in zip(self.prompts, self.first, strict=True)])
        difference = mine.reshape(-1, SAMPLES_PER_PROMPT)[:, :, None] - first.reshape(-1, SAMPLES_PER_PROMPT)[:, None, :]
        wins, losses = (difference > 0).mean(), (difference < 0).mean()
        return Point(
            reactions=reactions,
            win_rate=float(wins / (wins + losses)) if wins + losses else 0.5,
            win_rate_ties_half=float(wins + (1 - wins - losses) / 2),
            utility=float(mine.mean()),
            well_formed=float(np.mean([one.is_well_formed for one in said])),
            perplexity_ratio=self._perplexity() / self.perplexity,
            kl=kl_to_base(self.model, said),
            stopped=run.stopped,
            drifted=run.drifted,
        )

    def generate_answers(self, prompts: Sequence[str], seed: int) -> list[Sample]:
        asked, policy = [self.tokenize_prompt(one) for one in prompts], self.config.policy
        return generate(
            self.model, self.tokenizer, asked, policy.max_tokens, seed, policy.truncation, batch_size=SAMPLES_AT_ONCE
        )

    def _tokenize_dialogues(self) -> Rows:
        return [
            (self.tokenizer.prompt_ids(dialogue[:-1]), self.tokenizer.completion_ids(dialogue[-1]["content"]))
            for dialogue in toy.make_dialogues(128, seed=10_000 + self.seed)
        ]

    def _perplexity(self) -> float:
        return perplexity(batched_logprobs(self.model, self.untouched))

    def reset_policy(self) -> None:
        """Restore version 0."""
        restore_weights(self.model, self.start)
        self.since = 0


def talk(arena: Arena, people: ReactingPeople, reactions: int) -> list[Experience]:
    """Let people talk with the current policy until there are `reactions` reactions, and return the experiences."""
    rng = people.rng
    asked = arena.said
    found: list[Experience] = []
    while len(found) < reactions:
        batch = [rng.choice(asked) for _ in range(32)]
        answers = arena.generate_answers(batch, rng.randrange(2**31))
        again = []
        for text, answer in zip(batch, answers, strict=True):
            likes = people.give_opinion(text, answer.text)
            if likes is not None:
                found.append(make_experience(arena, text, answer, likes, rng))
                if not likes and rng.random() < REGENERATES:
                    again.append((text, len(found) - 1))
        for (text, first), answer in zip(
            again, arena.generate_answers([text for text, _ in again], rng.randrange(2**31)), strict=True
        ):
            likes = people.give_opinion(text, answer.text)
            if likes is not None:
                other = make_experience(arena, text, answer, likes, rng)
                found.append(
                    replace(other, rejected_ids=found[first].completion_ids, unit=found[first].unit) if likes else other
                )
    return with_logprobs(arena, found[:reactions])


def make_experience(arena: Arena, question: str, answer: Sample, likes: bool, rng: random.Random) -> Experience:
    """Make the experience of an answer and the reaction to it."""
    return Experience(
        turn_id="",
        unit=str(rng.random()),
        prompt_ids=answer.prompt_ids,
        completion_ids=answer.completion_ids,
        logprobs=None,
        reward=1.0 if likes else -1.0,
        feedback_ids=(),
        question=question,
        answer=answer.text,
    )


def with_logprobs(arena: Arena, found: Sequence[Experience]) -> list[Experience]:
    """Add the log-probabilities of the current policy, which sampled the answers, to experiences."""
    logprobs = batched_logprobs(arena.model, token_rows(found))
    return [replace(one, logprobs=tuple(row.tolist())) for one, row in zip(found, logprobs, strict=True)]


def train_policy(
    arena: Arena,
    found: Sequence[Experience],
    objective: str,
    number: int,
    make_further: MakeFurther = prefer_to_own_answers,
    unjudged: Sequence[tuple[int, ...]] = (),
) -> RunEnd:
    """Train once on experiences, with selection, drift detection and guard as in production.

    `make_further` makes further rows of the corrections among them. `unjudged` are prompts whose answers nobody judged,
    newest first.
    """
    found = found[arena.since :]
    config = arena.config
    judges = config.policy, config.serving, config.rewards
    change = detect_drift(*judges, arena.base_model, arena.model, found) if config.learning.detect_drift else None
    if change is not None:
        found = found[change.since :]
        since = arena.since + change.since
        if change.against:
            arena.reset_policy()
        arena.since = since
    training = config.training.model_copy(update={"objective": objective})
    config = config.model_copy(update={"seed": arena.seed + number, "training": training})
    taught, held_out = split_held_out(found, config.learning.held_out)
    rows = with_advantages(taught, arena.embedder, config.rewards, arena.seed)
    prompts = list(dict.fromkeys(one.prompt_ids for one in [*held_out, *taught]))
    before = copy_weights(arena.model)
    told = arena.model, arena.tokenizer

    def teach(settings: Config, rows: Sequence[Experience]) -> TrainingMetrics:
        return train_with_guard(settings, *told, rows, held_out, prompts, lambda *_: None)

    figures = teach(config, [*make_further(config, *told, rows), *rows])
    if figures.is_harmed:
        restore_weights(arena.model, before)  # in production the version would be rejected
    elif is_proven(config, found, arena.embedder):
        distil(config, *told, found, order_prompts(taught, unjudged), arena.embedder, teach)
    return RunEnd(figures.stopped is not None, change is not None)


def prepare_process(seed: int) -> None:
    """Prepare a process for one cell: with one thread, and with an adapter that does not depend on what it did before."""
    import torch
    from transformers import set_seed

    torch.set_num_threads(1)
    silence_libraries()
    set_seed(seed)
