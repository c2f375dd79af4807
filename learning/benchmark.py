"""Benchmarks: every figure that the project claims about serving, measured here against the real vLLM.

Timings are ratios or differences against a baseline that is measured in the same run, in alternating blocks. It knows no
training: the adapters that it swaps are made of random weights.

Run: ``kibitz bench swap``, ``kibitz bench overhead``.
"""

import asyncio
import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bot.dialogue import DialogueManager
from bot.policy import Policy
from bot.registry import BASE, PolicyRegistry
from bot.types import Conversation, Message, PolicyVersion, new_id, now
from learning import demo
from learning.deployment import Deployment
from learning.trainer import fingerprint

Progress = Callable[[str, int, int], None]

LINES = 4  # messages in one conversation
STALL = 5.0  # an answer is stalled if it takes this many times the median without swaps


def random_adapter(base_model: str, directory: Path, rank: int, seed: int) -> None:
    """Save a LoRA adapter of random weights, strong enough to change what is said, with its probe."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from learning.evaluation import next_logprobs
    from learning.trainer import write_probe

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto")
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = base_model
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.05)
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    ids = torch.randint(3, base.config.vocab_size, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    prefixes = [ids[:end] for end in range(8, len(ids))]
    own = next_logprobs(model, prefixes)
    with model.disable_adapter():
        write_probe(directory, prefixes, own, next_logprobs(model, prefixes))
    (directory / "manifest.json").write_text("{}")


def register_copy(registry: PolicyRegistry, source: Path, policies: Path) -> PolicyVersion:
    """A new version, under a name of its own, with the weights of `source`."""
    version = registry.reserve(registry.get(BASE), policies)
    shutil.copytree(source, version.path)
    return registry.complete(version.name, fingerprint(source), {})


@dataclass(frozen=True)
class Answer:
    """One answer under load: what was asked of which version, what came, and how long it took."""

    prompt: str
    version: str
    text: str
    seconds: float
    tokens: int


async def load(
    policy: Policy, prompts: Iterator[str], concurrent: int, done: Callable[[], None]
) -> tuple[list[Answer], int, float]:
    """A greedy answer to each prompt from the pointer's version, `concurrent` at a time: answers, failures, seconds."""
    answers: list[Answer] = []
    failed = 0

    async def worker() -> None:
        nonlocal failed
        for prompt in prompts:
            began = time.monotonic()
            try:
                reply = await policy.reply(_asked(prompt), temperature=0.0)
                seconds = time.monotonic() - began
                answers.append(Answer(prompt, reply.policy_version, reply.text, seconds, len(reply.completion_ids)))
            except Exception:  # a benchmark counts every failure, whatever it is
                failed += 1
            done()

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrent):
            group.create_task(worker())
    return answers, failed, time.monotonic() - began


async def references(policy: Policy, version: str, prompts: Sequence[str]) -> dict[str, str]:
    """What `version` says greedily to each prompt, asked on a quiet server and past its prefix cache."""
    said = {}
    for prompt in prompts:
        reply = await policy.reply(_asked(prompt), version=version, temperature=0.0, cache_salt=new_id())
        said[prompt] = reply.text
    return said


def mixed(answers: Sequence[Answer], expected: dict[str, dict[str, str]]) -> int:
    """How many answers are not word for word what their version says."""
    return sum(answer.text != expected[answer.version][answer.prompt] for answer in answers)


@dataclass(frozen=True)
class Stage:
    """What a swap is benchmarked on: a running server, its versions, and where they are kept."""

    policy: Policy
    registry: PolicyRegistry
    deployment: Deployment
    policies: Path

    async def go_live(self, source: Path) -> PolicyVersion:
        """Take a copy of `source` live under a name of its own, by the real deployment."""
        version = register_copy(self.registry, source, self.policies)
        return await self.deployment.deploy(version.name)


async def swap(
    stage: Stage,
    sources: Sequence[Path],
    swaps: int,
    requests: int,
    concurrent: int,
    progress: Progress,
) -> dict[str, Any]:
    """Streaming load, first without and then with `swaps` swaps through the real deployment."""
    policy = stage.policy
    prompts = [LONG + prompt for prompt, _ in demo.prompts(held_out=True)[:24]]
    reached: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)  # how many requests are finished
    finished = 0

    def done() -> None:
        nonlocal finished
        finished += 1
        reached[finished].set()
        progress("streaming load", finished, 2 * requests)

    expected: dict[str, dict[str, str]] = {}
    said_by: list[dict[str, str]] = []
    for source in sources:  # what each set of weights says, from a version of its own on a quiet server
        version = await stage.go_live(source)
        said_by.append(await references(policy, version.name, prompts))
        expected[version.name] = said_by[-1]
    await load(policy, islice(cycle(prompts), 64), concurrent, lambda: None)  # warms up, not counted
    quiet = []
    for source in sources:  # answers of other weights have other lengths: the baseline holds all of them
        expected[(await stage.go_live(source)).name] = said_by[sources.index(source)]
        quiet.append(await load(policy, islice(cycle(prompts), requests // len(sources)), concurrent, done))
    swapped = asyncio.Event()
    until_swapped = takewhile(lambda _: not swapped.is_set(), cycle(prompts))
    busy = asyncio.create_task(load(policy, until_swapped, concurrent, done))
    for number in range(swaps):
        await reached[finished + requests // swaps].wait()
        version = await stage.go_live(sources[number % len(sources)])
        expected[version.name] = said_by[number % len(sources)]
    await reached[finished + requests // swaps].wait()
    swapped.set()
    answers, failed, seconds = await busy
    still = [answer for part, _, _ in quiet for answer in part]
    usual = statistics.median(answer.seconds for answer in still)
    quiet_seconds = sum(part[2] for part in quiet)
    return {
        "swaps": len({answer.version for answer in answers}) - 1,
        "requests": len(answers) + failed,
        "failed": failed,
        "mixed": mixed(answers, expected),
        "stalled": sum(answer.seconds > STALL * usual for answer in answers),
        "throughput_ratio": _tokens(answers) / seconds / (_tokens(still) / quiet_seconds),
        "p99_ratio": _percentile(answers, 99) / _percentile(still, 99),
        "requests_without_swaps": len(still),
        "tokens_per_s": _tokens(answers) / seconds,
    }


# Longer than one block of vLLM's prefix cache (128 tokens on a CPU), so that a stale cache would show.
LONG = "please listen. " * 60


async def overhead(
    dialogue: DialogueManager, policy: Policy, messages: int, blocks: int, seed: int, progress: Progress
) -> dict[str, float]:
    """DialogueManager against the same prompts with the same sampling seeds straight to vLLM, in alternating blocks.

    "Straight" is a plain streamed completion; "same request" also asks for the log-probabilities and token ids that law 4
    records, which are a cost of vLLM's.
    """
    figures: dict[str, float] = {}
    total = 0
    for concurrent in (1, 16):
        took: dict[str, list[float]] = {"dialogue": [], "straight": [], "logged": []}
        spent = dict.fromkeys(took, 0.0)
        for block in range(-1, blocks):  # the first is for warming up and not counted
            rng = random.Random(f"{seed} {concurrent} {block}")
            heard: list[list[tuple[Message, int]]] = []
            for _ in range(messages // LINES):
                place = await dialogue.open(Conversation("benchmark", channel=new_id()))
                texts = [rng.choice(demo.prompts(held_out=False))[0] for _ in range(LINES)]
                heard.append([(Message(place.id, "user", text), rng.randrange(2**31)) for text in texts])

            async def through(message: Message, number: int, salt: str) -> None:
                await dialogue.respond(replace(message, at=now()), seed=number)

            async def straight(sent: list[dict[str, str]], number: int, salt: str) -> None:
                await policy.reply(sent, seed=number, cache_salt=salt, logged=False)

            async def logged(sent: list[dict[str, str]], number: int, salt: str) -> None:
                await policy.reply(sent, seed=number, cache_salt=salt)

            async def timed(name: str, job: Callable[..., Any], work: list) -> None:
                nonlocal total
                progress("talking", total, 6 * (blocks + 1))
                seconds, times = await _at_a_time(concurrent, job, work)  # noqa: B023 (awaited in the loop)
                if block >= 0:  # noqa: B023
                    spent[name] += seconds  # noqa: B023
                    took[name] += times  # noqa: B023
                total += 1

            await timed("dialogue", through, heard)
            sent = [[(await _shown(dialogue, message), number) for message, number in lines] for lines in heard]
            for name, job in rng.sample([("straight", straight), ("logged", logged)], 2):
                await timed(name, job, sent)
        for name in ("straight", "logged"):
            suffix = f"_{concurrent}" if name == "straight" else f"_{concurrent}_same_request"
            figures[f"throughput_ratio{suffix}"] = spent[name] / spent["dialogue"]
            for percent in (50, 99):
                added = np.percentile(took["dialogue"], percent) - np.percentile(took[name], percent)
                figures[f"p{percent}_added_ms{suffix}"] = 1000 * float(added)
        figures[f"messages_per_s_{concurrent}"] = len(took["dialogue"]) / spent["dialogue"]
        figures[f"straight_p50_ms_{concurrent}"] = 1000 * float(np.percentile(took["straight"], 50))
    return figures


async def _shown(dialogue: DialogueManager, message: Message) -> list[dict[str, str]]:
    """What the policy was shown for a message that was answered already."""
    stored = await dialogue.store.database.call(dialogue.store.message, message.id)
    return (await dialogue.tracker.context(stored)).messages


async def _at_a_time(concurrent: int, job: Callable[..., Any], work: Sequence[Any]) -> tuple[float, list[float]]:
    """Run conversations line by line, `concurrent` of them at a time; returns the seconds in all and for each line."""
    queue = iter(work)
    took: list[float] = []

    async def worker() -> None:
        for lines in queue:
            salt = new_id()
            for item, number in lines:
                began = time.monotonic()
                await job(item, number, salt)
                took.append(time.monotonic() - began)

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrent):
            group.create_task(worker())
    return time.monotonic() - started, took


def _asked(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.tokens for answer in answers)


def _percentile(answers: Sequence[Answer], percent: float) -> float:
    return float(np.percentile([answer.seconds for answer in answers], percent))
