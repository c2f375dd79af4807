"""Benchmark: measure the time that DialogueManager adds to the same prompts sent straight to vLLM, and what candidates cost.

Timings are ratios or differences against a baseline that is measured in the same run, in alternating blocks.

Run: ``kibitz bench overhead``, or ``kibitz bench overhead --candidates 4,8``.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bot.chat.dialogue import DialogueManager, ReplyOptions
from bot.chat.tracker import Context
from bot.serving.policy import Policy
from bot.serving.selection import SamplingPlan
from bot.types import Candidate, Conversation, Message, Progress, Reply, Selection, Turn, new_id, now
from learning.bench.swap import LENGTH
from learning.models import toy

LINES = 4  # messages per conversation


@dataclass
class Timing:
    """The times of one way of answering (s): of each message, of all messages together, and from each message to its first
    text, if that was measured.
    """

    messages: list[float] = field(default_factory=list)
    seconds: float = 0.0
    first_texts: list[float] = field(default_factory=list)


class FirstInAlphabet:
    """A selector that always samples as many answers as it may, and chooses without any work."""

    def plan(self, asker_id: str, most: int) -> SamplingPlan:
        """Return a plan with `most` answers."""
        return SamplingPlan(most)

    async def choose(self, replies: Sequence[Reply], rival: Turn | None = None, asker_id: str = "") -> Selection:
        """Choose the answer that comes first in alphabetical order."""
        chosen = min(range(len(replies)), key=lambda row: replies[row].text)
        return Selection(head="alphabet", chosen=chosen, candidates=[Candidate(text=one.text) for one in replies])

    def notice_feedback(self) -> None:
        """Learn nothing."""


Job = Callable[[Any, int, str], Awaitable[Any]]  # (line of a conversation, sampling seed, cache salt)


async def measure_overhead(
    dialogue: DialogueManager, policy: Policy, messages: int, blocks: int, seed: int, progress: Progress, alone: int = 0
) -> dict[str, float]:
    """Time DialogueManager against the same prompts and sampling seeds sent straight to vLLM, in alternating blocks.

    All answers have LENGTH tokens, so that each side does the same work. "straight" is the plain streamed chat completion
    that any client would send. "same_request" is the request that kibitz sends: token ids in, token ids and their
    log-probabilities out. A block has `messages` messages, or `alone` if given, when one is sent at a time.
    """

    async def through(message: Message, number: int, _: str) -> None:
        await dialogue.respond(replace(message, at=now()), ReplyOptions(seed=number))

    async def straight(context: Context, number: int, salt: str) -> None:
        await chat_completion(policy, context.messages, number, salt)

    async def same(context: Context, number: int, salt: str) -> None:
        await policy.reply(context.prompt_ids, seed=number, cache_salt=salt)

    figures: dict[str, float] = {}
    done = 0
    with policy.fixed_length(LENGTH):
        for concurrent in (1, 16):
            timings = {"dialogue": Timing(), "straight": Timing(), "same_request": Timing()}
            for block in range(-1, blocks):  # the first block warms up and is not counted
                rng = random.Random(f"{seed} {concurrent} {block}")
                count = (alone or messages) if concurrent == 1 else messages
                heard = [await _lines(dialogue, rng) for _ in range(count // LINES)]
                jobs: list[tuple[str, Job]] = [("straight", straight), ("same_request", same)]
                for name, job in [("dialogue", through), *rng.sample(jobs, 2)]:
                    progress("talking", done, 6 * (blocks + 1))
                    timing = await _run_concurrently(concurrent, job, heard)
                    if name == "dialogue":  # the other two send the prompts that it built
                        heard = [[(await _context(dialogue, line), number) for line, number in lines] for lines in heard]
                    if block >= 0:
                        timings[name].seconds += timing.seconds
                        timings[name].messages += timing.messages
                    done += 1
            for name, suffix in (("straight", f"_{concurrent}"), ("same_request", f"_{concurrent}_same_request")):
                figures |= {
                    f"{key}{suffix}": value for key, value in _compute_added(timings["dialogue"], timings[name]).items()
                }
            figures[f"messages_per_s_{concurrent}"] = len(timings["dialogue"].messages) / timings["dialogue"].seconds
            figures[f"straight_p50_ms_{concurrent}"] = 1000 * float(np.percentile(timings["straight"].messages, 50))
        return figures


async def measure_candidates(
    dialogue: DialogueManager, counts: Sequence[int], messages: int, blocks: int, seed: int, progress: Progress
) -> dict[str, float]:
    """Time answers that are chosen from `counts` candidates against single ones, in alternating blocks of `messages`.

    Throughput is measured with 16 conversations at a time, latency (at the median) with one. All answers have LENGTH tokens.
    """
    counts = sorted({1, *counts})
    chosen = {
        count: DialogueManager(dialogue.store, dialogue.tracker, dialogue.policy, FirstInAlphabet(), count)
        for count in counts
    }
    figures: dict[str, float] = {}
    done = 0
    with dialogue.policy.fixed_length(LENGTH):
        for concurrent in (1, 16):
            timings = {count: Timing() for count in counts}
            for block in range(-1, blocks):  # the first block warms up and is not counted
                rng = random.Random(f"{seed} {concurrent} {block}")
                for count in rng.sample(counts, len(counts)):
                    progress("choosing", done, 2 * (blocks + 1) * len(counts))
                    lines = random.Random(f"{seed} {concurrent} {block} messages")  # the same for each count
                    heard = [await _lines(dialogue, lines) for _ in range(messages // LINES)]
                    timing = await _run_with_first_texts(concurrent, chosen[count], heard)
                    if block >= 0:
                        timings[count].seconds += timing.seconds
                        timings[count].messages += timing.messages
                        timings[count].first_texts += timing.first_texts
                    done += 1
            for count in counts[1:]:
                figures |= _compare_with_one(count, timings[count], timings[1], is_alone=concurrent == 1)
    return figures


async def _run_with_first_texts(
    concurrent: int, dialogue: DialogueManager, heard: Sequence[Sequence[tuple[Any, int]]]
) -> Timing:
    first_texts: list[float] = []

    async def respond(message: Message, number: int, _: str) -> None:
        began, pieces = time.monotonic(), list[float]()
        await dialogue.respond(
            replace(message, at=now()), ReplyOptions(lambda _: pieces.append(time.monotonic() - began), seed=number)
        )
        first_texts.append(pieces[0] if pieces else time.monotonic() - began)

    return replace(await _run_concurrently(concurrent, respond, heard), first_texts=first_texts)


def _compare_with_one(count: int, several: Timing, one: Timing, is_alone: bool) -> dict[str, float]:
    if not is_alone:
        return {f"candidates_{count}_throughput_ratio": one.seconds / several.seconds}
    return {
        f"candidates_{count}_first_text_ratio": float(np.median(several.first_texts) / np.median(one.first_texts)),
        f"candidates_{count}_final_text_ratio": float(np.median(several.messages) / np.median(one.messages)),
    }


async def chat_completion(policy: Policy, messages: list[dict[str, str]], seed: int, salt: str) -> str:
    """Stream a chat completion as a client without kibitz would, and return its text."""
    config = policy.config
    body: dict[str, Any] = {"model": policy.admin.find_served_name(policy.version), "messages": messages, "seed": seed}
    body |= {"max_tokens": LENGTH, "ignore_eos": True, **config.sampling.as_json()}
    events = policy.admin.stream("/v1/chat/completions", body | {"cache_salt": salt})
    return "".join([choice["delta"].get("content") or "" async for event in events for choice in event["choices"]])


def _compute_added(dialogue: Timing, baseline: Timing) -> dict[str, float]:
    added = {
        f"p{percent}_added_ms": 1000
        * float(np.percentile(dialogue.messages, percent) - np.percentile(baseline.messages, percent))
        for percent in (50, 99)
    }
    return {"throughput_ratio": baseline.seconds / dialogue.seconds, **added}


async def _lines(dialogue: DialogueManager, rng: random.Random) -> list[tuple[Any, int]]:
    """Open a conversation and make its messages, with the sampling seeds of their answers."""
    place = await dialogue.open(Conversation("benchmark", channel=new_id()))
    texts = [rng.choice(toy.list_prompts())[0] for _ in range(LINES)]
    return [(Message(place.id, "user", text), rng.randrange(2**31)) for text in texts]


async def _context(dialogue: DialogueManager, message: Message) -> Context:
    """Build again the context of a message that was answered already."""
    stored = await dialogue.store.database.call(dialogue.store.read_message, message.id)
    return await dialogue.tracker.build_context(stored)


async def _run_concurrently(concurrent: int, job: Job, conversations: Sequence[Sequence[tuple[Any, int]]]) -> Timing:
    """Run conversations line by line, `concurrent` of them at a time."""
    queue = iter(conversations)
    timing = Timing()

    async def worker() -> None:
        for lines in queue:
            salt = new_id()
            for line, number in lines:
                began = time.monotonic()
                await job(line, number, salt)
                timing.messages.append(time.monotonic() - began)

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrent):
            group.create_task(worker())
    timing.seconds = time.monotonic() - started
    return timing
