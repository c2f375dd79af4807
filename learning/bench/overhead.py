"""Benchmark: measure the time that DialogueManager adds to the same prompts sent straight to vLLM.

Timings are ratios or differences against a baseline that is measured in the same run, in alternating blocks.

Run: ``kibitz bench overhead``.
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
from bot.types import Conversation, Message, Progress, new_id, now
from learning.bench.swap import LENGTH
from learning.models import toy

LINES = 4  # messages per conversation


@dataclass
class Timing:
    """The times of one way of answering: of each message (s), and of all messages together (s)."""

    messages: list[float] = field(default_factory=list)
    seconds: float = 0.0


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
