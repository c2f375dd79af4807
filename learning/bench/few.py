"""Benchmark: what few reactions change, in the served answers and in the weights, beside a frozen and a placebo control.

Simulated people with a hidden utility react to one answer after the other. A reward head is fitted after each reaction, and
answers are chosen by it as in production (`learning.judging.best_of_n`).

- *served*: the base model's answers, chosen from at most 8 (or `serving.candidates`, if it is less). The plain tenth is left
  out of the figures.
- *weights*: every `learning.distil_every` reactions a version is trained as in production, without the gate. Its figures are
  those of single answers.
- *placebo*: the same with reactions that are drawn by lot.

Beside each answer that they react to, people say a few things that nobody judges; a run may answer these again.
Prompts by which answers are judged are never said by people. All win rates are those of the people's true utility over
version 0's answers to the same prompts, without ties. To models other than the toy people say everyday things in each of two
languages; they react to fewer answers, because each takes longer.

Run: ``kibitz bench learning --slice few``.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bot.config import Config
from learning.bench.arena import Arena, ReactingPeople, RunEnd, make_experience, prepare_process, train_policy
from learning.bench.simulated_people import Utility, find_utility, read_prompts
from learning.data.experience import Experience
from learning.data.feature_space import AnswerText, FeatureExtractor
from learning.judging.best_of_n import (
    MANY,
    MANY_E_VALUE,
    PLAIN_SHARE,
    compute_chances,
    count_candidates,
    is_harmful,
)
from learning.judging.evaluation import Sample, batched_logprobs, token_rows
from learning.judging.taught_head import TaughtHead, count_approval, fit_head
from learning.training.pretrain import is_toy

NOISE = 0.1  # the share of mistaken reactions
BATCH = 5  # reactions between two looks at the proof
UNJUDGED = 3  # things said beside each reaction
USUAL = 512  # of the latest candidates tell what answers are usually like
REFIT_ALWAYS, REFIT_EVERY = 50, 5  # reactions up to which the head is refitted after each; afterwards after so many


@dataclass(frozen=True)
class FewCell:
    """A part of the benchmark: with "served" as `arm` all served series of a seed, for these people and by lot; with
    "weights" or "placebo_weights" one series. Answers are judged after each number of reactions in `steps`.
    """

    arm: str
    users: tuple[str, ...]
    seed: int
    steps: tuple[int, ...]
    language: str = ""

    def describe(self) -> str:
        """Describe the cell to people who wait for it."""
        people = " ".join(Path(one).stem for one in self.users)
        return f"{self.arm} with {people}" + (f" in {self.language}" if self.language else "")


@dataclass(frozen=True)
class FewPoint:
    """The figures of one series after a number of reactions. `candidates` is the most answers that it ever chose from.

    `oracle` is the win rate of a choice among as many by the chance that these people approve; well-formedness, perplexity
    and KL (nats a token) are measured for weights only. `language` is empty for the toy's people.
    """

    arm: str
    users: str
    reactions: int
    win_rate: float
    candidates: int
    oracle: float | None = None
    well_formed: float | None = None
    perplexity_ratio: float | None = None
    kl: float | None = None
    language: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Candidates:
    """The answers of one policy to one prompt, as tokens, and as the head sees them."""

    prompt: str
    samples: Sequence[Sample]
    texts: Sequence[AnswerText]


def sample_candidates(arena: Arena, prompts: Sequence[str], seed: int) -> list[Candidates]:
    """Have the current policy answer each prompt as often as there may be answers to choose from."""
    most = _count_most(arena)
    samples = arena.generate_answers([prompt for prompt in prompts for _ in range(most)], seed)
    logprobs = batched_logprobs(arena.model, token_rows(samples))
    texts = [
        AnswerText(one.text, one.is_finished, float(row.mean()) if len(row) else None)
        for one, row in zip(samples, logprobs, strict=True)
    ]
    starts = range(0, len(samples), most)
    return [
        Candidates(prompt, samples[start : start + most], texts[start : start + most])
        for prompt, start in zip(prompts, starts, strict=True)
    ]


@dataclass
class Series:
    """Reactions that came in one after the other, and the head that was fitted to them."""

    arena: Arena
    people: ReactingPeople
    extractor: FeatureExtractor
    is_placebo: bool
    rated: list[Experience] = field(default_factory=list)
    usual: list[AnswerText] = field(default_factory=list)
    head: TaughtHead | None = None
    most_used: int = 1  # the most answers that were ever chosen from

    @property
    def candidates(self) -> int:
        """From how many answers the head may choose."""
        chosen, plain = (count_approval(one for one in self.rated if one.is_selected == kind) for kind in (True, False))
        if self.head is None or is_harmful(chosen, plain):
            return 1
        return count_candidates(self.head.peak_e_value, _count_most(self.arena))

    @property
    def is_proven(self) -> bool:
        """Whether the head may label answers."""
        return self.head is not None and self.head.peak_e_value >= MANY_E_VALUE

    def hear(self, offered: Sequence[Candidates]) -> None:
        """Let people react to one answer to each prompt."""
        for one in offered:
            self._hear(one)

    def _hear(self, offered: Candidates) -> None:
        rng, count = self.people.rng, self.candidates
        self.most_used = max(self.most_used, count)
        count = 1 if rng.random() < PLAIN_SHARE else count
        row = int(np.searchsorted(np.cumsum(self.choose(offered, count)), rng.random()))
        sample, text = offered.samples[row], offered.texts[row]
        likes = rng.random() < 0.5 if self.is_placebo else self.people.give_opinion(offered.prompt, sample.text)
        said = make_experience(self.arena, offered.prompt, sample, bool(likes), rng)
        # importance weights know plain samples only
        said = replace(said, is_finished=text.is_finished, mean_logprob=text.mean_logprob, is_selected=count > 1)
        self.rated.append(said)
        self.usual = [*self.usual, *offered.texts[:count]][-USUAL:]
        if len(self.rated) <= REFIT_ALWAYS or not len(self.rated) % REFIT_EVERY:
            peak = 0.0 if self.head is None else self.head.peak_e_value
            self.head = fit_head(self.rated, self.usual, self.extractor, cap=1.0, earlier_peak=peak)

    def choose(self, offered: Candidates, count: int) -> np.ndarray:
        """Return the probability (count,) that each of the first `count` answers is chosen."""
        if self.head is None or count == 1:
            return np.ones(1)
        return compute_chances(self.head.score(self.extractor.extract(offered.texts[:count])))


def run_cell(config: Config, base_model: str, cell: FewCell) -> list[FewPoint]:
    """Run a cell, and return its points. Meant for a process of its own."""
    prepare_process(cell.seed)
    arena = Arena(config, base_model, cell.seed, read_prompts(is_toy(base_model), cell.language))
    run = run_served if cell.arm == "served" else run_weights
    return [replace(point, seed=cell.seed, language=cell.language) for point in run(arena, cell)]


def run_served(arena: Arena, cell: FewCell) -> list[FewPoint]:
    """Let people react to answers of the base model, and judge the chosen ones. All series have the same answers."""
    rng = random.Random(f"{cell.seed} served")
    asked = [rng.choice(arena.said) for _ in range(cell.steps[-1])]
    offered = sample_candidates(arena, asked, rng.randrange(2**31))
    unseen = sample_candidates(arena, arena.prompts, rng.randrange(2**31))
    extractor, points = FeatureExtractor(arena.embedder), []
    for users in cell.users:
        utility = find_utility(users)
        oracle = _judge(arena, utility, unseen, [_choose_by_utility(utility, one) for one in unseen])
        for arm in ("served", "placebo_served"):
            series = _begin(arena, utility, f"{cell.seed} {users} {arm}", extractor, is_placebo=arm != "served")
            for step in cell.steps:
                series.hear(offered[len(series.rated) : step])
                chances = [series.choose(one, series.candidates) for one in unseen]
                win_rate = _judge(arena, utility, unseen, chances)
                points.append(FewPoint(arm, users, step, win_rate, series.most_used, oracle))
    return points


def run_weights(arena: Arena, cell: FewCell) -> list[FewPoint]:
    """Let people react to chosen answers of a policy that is trained again and again, and judge its single answers.

    It is trained when the head is proven for the first time, and after every `learning.distil_every` reactions.
    """
    [users] = cell.users
    utility, every = find_utility(users), arena.config.learning.distil_every
    is_placebo = cell.arm != "weights"
    series = _begin(arena, utility, f"{cell.seed} {users} {cell.arm}", FeatureExtractor(arena.embedder), is_placebo)
    rng, silent = series.people.rng, random.Random(f"{cell.seed} {users} unjudged")
    points, end, was_proven = [], RunEnd(), False
    unjudged: list[tuple[int, ...]] = []
    for step in range(BATCH, cell.steps[-1] + 1, BATCH):
        asked = [rng.choice(arena.said) for _ in range(step - len(series.rated))]
        series.hear(sample_candidates(arena, asked, rng.randrange(2**31)))
        unjudged += [arena.tokenize_prompt(silent.choice(arena.said)) for _ in range(UNJUDGED * BATCH)]
        is_new_proof = not was_proven and series.is_proven
        was_proven = was_proven or is_new_proof
        if is_new_proof or not step % every:
            end = train_policy(arena, series.rated, arena.config.training.objective, step, unjudged=unjudged[::-1])
        if step in cell.steps:
            found = arena.judge_policy(step, utility, end)
            measured = found.well_formed, found.perplexity_ratio, found.kl
            points.append(FewPoint(cell.arm, users, step, found.win_rate, series.most_used, None, *measured))
    return points


def _count_most(arena: Arena) -> int:
    """Count the answers that may be chosen from, at most."""
    return min(MANY, arena.config.serving.candidates)


def _begin(arena: Arena, utility: Utility, seed: str, extractor: FeatureExtractor, is_placebo: bool) -> Series:
    return Series(arena, ReactingPeople(utility, NOISE, 1.0, random.Random(seed)), extractor, is_placebo)


def _choose_by_utility(utility: Utility, offered: Candidates) -> np.ndarray:
    """Return the probability (n,) of a choice by the chance that people approve, at random among equals."""
    approved = np.sign([utility(offered.prompt, one.text) for one in offered.samples])
    best = approved == approved.max()
    return best / best.sum()


def _judge(arena: Arena, utility: Utility, offered: Sequence[Candidates], chances: Sequence[np.ndarray]) -> float:
    """Return the win rate of chosen answers over version 0's answers to the same prompts, without ties."""
    first: dict[str, list[float]] = {}
    for prompt, answer in zip(arena.prompts, arena.first, strict=True):
        first.setdefault(prompt, []).append(utility(prompt, answer.text))
    wins = losses = 0.0
    for one, chance in zip(offered, chances, strict=True):
        mine = np.array([utility(one.prompt, sample.text) for sample in one.samples[: len(chance)]])
        away = mine[:, None] - np.array(first[one.prompt])
        wins += float(chance @ (away > 0).mean(1))
        losses += float(chance @ (away < 0).mean(1))
    return wins / (wins + losses) if wins + losses else 0.5
