"""HeldOutJudge: measures by people's hidden utility what answers to the held-out prompts are worth, single and chosen.

It asks vLLM and the reward head, and teaches neither: nothing is stored, and the head keeps what it knows.
"""

import asyncio
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bot.chat.dialogue import DialogueManager
from bot.serving.policy import Policy
from bot.types import Progress, Reply
from learning.bench.simulated_people import People
from learning.data.feature_space import FeatureExtractor
from learning.judging.best_of_n import compute_chances, count_candidates
from learning.judging.evaluation import is_well_formed
from learning.judging.taught_head import TaughtHead
from learning.rollout.selector import HeadSelector, describe_text

CONCURRENT = 16  # requests at once
SERVED_SAMPLES = 1  # requests for candidates for each prompt


@dataclass(frozen=True)
class HeldOutAnswers:
    """A version's answers to the held-out prompts: utility by prompt, first answer by prompt, and shares of all answers."""

    utilities: dict[str, float]
    first: dict[str, str]
    well_formed: float
    ended: float


@dataclass(frozen=True)
class ServedAnswers:
    """The head's choice among `candidates` answers to each held-out prompt: its utility, and the likeliest answer."""

    utilities: dict[str, float]
    likeliest: dict[str, str]
    candidates: int


class HeldOutJudge:
    """Judges versions by their answers to prompts that people never say. All versions get the same sampling seeds."""

    def __init__(
        self,
        dialogue: DialogueManager,
        policy: Policy,
        selector: HeadSelector | None,
        people: People,
        prompts: Sequence[str],
        progress: Progress,
    ):
        self.dialogue = dialogue
        self.policy = policy
        self.selector = selector
        self.people = people
        self.prompts = prompts
        self.progress = progress
        self._extractor = FeatureExtractor(dialogue.tracker.recall.embedder)  # of its own: the head's is the head's
        self._candidates: tuple[str, dict[str, list[Reply]]] = ("", {})  # those of one version, by prompt

    async def ask(self, version: str, samples: int) -> HeldOutAnswers:
        """Ask a version each held-out prompt `samples` times, with the same sampling seeds as every other version."""
        replies: dict[str, dict[int, Reply]] = {prompt: {} for prompt in self.prompts}

        async def one(prompt: str, number: int, seed: int) -> None:
            replies[prompt][number] = await self.policy.reply(self._find_ids(prompt), version=version, seed=seed)

        seeds = random.Random(self.people.seed)
        work = [one(prompt, number, seeds.randrange(2**31)) for number in range(samples) for prompt in self.prompts]
        await run_together(work, CONCURRENT, f"judging {version}", self.progress)
        every = [reply for those in replies.values() for reply in those.values()]
        return HeldOutAnswers(
            utilities={
                prompt: sum(self.people.utility(prompt, reply.text) for reply in those.values()) / len(those)
                for prompt, those in replies.items()
            },
            first={prompt: those[0].text for prompt, those in replies.items()},
            well_formed=sum(is_well_formed(reply.text) for reply in every) / len(every),
            ended=sum(reply.finish_reason == "stop" for reply in every) / len(every),
        )

    async def choose(self, version: str, single: HeldOutAnswers) -> ServedAnswers:
        """Have the head as it stands choose among a version's answers to each held-out prompt.

        Utilities are the mean over its choice, by the chance of each answer. Without a head the `single` answers are served.
        """
        if self.selector is None:
            return ServedAnswers(single.utilities, single.first, candidates=1)
        await self.selector.wait_until_current()
        head = self.selector.head
        count = 1 if head is None else count_candidates(head.peak_e_value, self.dialogue.sampler.candidates)
        if head is None or count == 1:
            return ServedAnswers(single.utilities, single.first, candidates=1)
        utilities, likeliest = {}, {}
        for prompt, replies in (await self._sample_candidates(version, count)).items():
            chances = await asyncio.to_thread(self._compute_chances, head, replies)
            utilities[prompt] = float(chances @ [self.people.utility(prompt, reply.text) for reply in replies])
            likeliest[prompt] = replies[int(chances.argmax())].text
        return ServedAnswers(utilities, likeliest, count)

    def _compute_chances(self, head: TaughtHead, replies: Sequence[Reply]) -> np.ndarray:
        raw = self._extractor.extract([describe_text(one) for one in replies])
        return compute_chances(head.score(raw))

    async def _sample_candidates(self, version: str, count: int) -> dict[str, list[Reply]]:
        """Return `count` answers to each held-out prompt, without blank ones, as chats do.

        The seed is that of the first single answer. Answers that were sampled for an earlier row are used again.
        """
        known, found = self._candidates
        if known != version or count > min(len(replies) for replies in found.values()):
            found = {}

            async def one(prompt: str, seed: int) -> None:
                found[prompt] = await self.policy.sample_replies(self._find_ids(prompt), count, version=version, seed=seed)

            seeds = random.Random(self.people.seed)
            work = [one(prompt, seeds.randrange(2**31)) for prompt in self.prompts]
            await run_together(work, CONCURRENT, f"judging {version} with {count} candidates", self.progress)
            self._candidates = version, found
        offered = {prompt: found[prompt][:count] for prompt in self.prompts}
        return {prompt: [one for one in those if one.text.strip()] or those[:1] for prompt, those in offered.items()}

    def _find_ids(self, prompt: str) -> Sequence[int]:
        return self.dialogue.tracker.fit_messages([{"role": "user", "content": prompt}]).prompt_ids


async def run_together(work: Sequence[Coroutine[Any, Any, None]], together: int, stage: str, progress: Progress) -> None:
    """Run coroutines, `together` at once, and report how many are done."""
    places = asyncio.Semaphore(together)
    done = 0

    async def one(job: Coroutine[Any, Any, None]) -> None:
        nonlocal done
        async with places:
            await job
        done += 1
        progress(stage, done, len(work))

    async with asyncio.TaskGroup() as group:
        for job in work:
            group.create_task(one(job))
