"""Benchmark: swap versions under streaming load, on the real vLLM.

Timings are ratios or differences against a baseline that is measured in the same run, in alternating blocks. The versions
are not trained: they differ from the base by random weights.

Run: ``kibitz bench swap``.
"""

import asyncio
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bot.accelerator import has_gpu
from bot.config import Config
from bot.models.tokenizer import ChatTokenizer
from bot.serving.admin import TOP_LOGPROBS
from bot.serving.policy import Policy
from bot.store.registry import PolicyRegistry
from bot.types import Metrics, PolicyVersion, Progress, new_id
from learning.models import toy
from learning.models.version_files import fingerprint
from learning.rollout.deployment import Deployment
from learning.training.pretrain import is_toy

Prompt = tuple[int, ...]

LENGTH = 32  # tokens of each answer, so that all sides do the same work
PROMPTS = 24  # different prompts under load
UNLISTED = 10.0  # nats, the distance of a token that is not among a version's likeliest: rounding cannot cause that
BLOCK = 128  # tokens of a block of vLLM's prefix cache on a CPU; on a GPU it is smaller
STALL = 5.0  # an answer is stalled if it takes this many times as long as the same answer without swaps


@dataclass(frozen=True)
class ServingDefaults:
    """The default size of the serving benchmarks."""

    swaps: int
    requests: int
    messages: int
    alone: int
    blocks: int


def choose_defaults(model: str) -> ServingDefaults:
    """Return the defaults for the toy policy or a GPU, or for another model on CPUs (some minutes on two cores)."""
    is_fast = is_toy(model) or has_gpu()
    return (
        ServingDefaults(6, 600, 128, 128, 3)
        if is_fast
        else ServingDefaults(swaps=3, requests=64, messages=64, alone=16, blocks=2)
    )


def save_random_version(config: Config, base_model: str, directory: Path, seed: int) -> None:
    """Save random changes of the base's weights, large enough to change every answer, with their probe."""
    import torch

    from learning.judging import probe
    from learning.models.trainable import as_base, cast_for_serving, load_for_training, save

    torch.manual_seed(seed)
    model = load_for_training(config.policy, config.serving, config.training, base_model)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.requires_grad and "lora_A" not in name:
                weights.add_(torch.randn_like(weights), alpha=0.05)
    cast_for_serving(model)
    directory.mkdir(parents=True)
    save(model, directory)
    ids = torch.randint(3, model.config.vocab_size, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    prefixes = [ids[:end] for end in range(8, len(ids))]
    own = probe.measure(model, prefixes)
    with as_base(model):
        probe.write(directory, prefixes, own, probe.measure(model, prefixes), config.policy.temperature)
    (directory / "manifest.json").write_text("{}")


def register_copy(registry: PolicyRegistry, source: Path) -> PolicyVersion:
    """Register a copy of the weights in `source` as a new version, judged against the live one."""
    version = registry.reserve(registry.get_base())
    shutil.copytree(source, version.path)
    return registry.complete(version.name, fingerprint(source), Metrics(judged_against=registry.get_live().name))


@dataclass(frozen=True)
class TimedAnswer:
    """One answer under load, with its prompt, version and time (s)."""

    prompt: Prompt
    version: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    seconds: float


async def run_load(
    policy: Policy, prompts: Iterator[Prompt], concurrent: int, done: Callable[[], None]
) -> tuple[list[TimedAnswer], int, float]:
    """Ask for a greedy answer to each prompt from the policy's current version, `concurrent` at a time.

    Returns the answers, the number of failures, and the seconds taken. Calls `done` after each prompt.
    """
    answers: list[TimedAnswer] = []
    failed = 0

    async def worker() -> None:
        nonlocal failed
        for prompt in prompts:
            began = time.monotonic()
            try:
                reply = await policy.reply(prompt, temperature=0.0)
                seconds = time.monotonic() - began
                answers.append(TimedAnswer(prompt, reply.policy_version, reply.completion_ids, reply.logprobs, seconds))
            except Exception:  # the benchmark counts every kind of failure
                failed += 1
            done()

    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrent):
            group.create_task(worker())
    return answers, failed, time.monotonic() - began


@dataclass(frozen=True)
class GreedyAnswer:
    """A version's greedy answer to a prompt: token ids, and the log-probabilities (nats) of the likeliest tokens at each."""

    ids: tuple[int, ...]
    listed: tuple[dict[int, float], ...]

    def distance(self, ids: Sequence[int], logprobs: Sequence[float]) -> float:
        """Return the mean distance (nats) of another answer's log-probabilities from ours, up to the first other token.

        Rounding changes a token only if two are about equally likely; other weights change log-probabilities by much.
        """
        found: list[float] = []
        for own, listed, token, logprob in zip(self.ids, self.listed, ids, logprobs, strict=False):
            found.append(abs(logprob - listed[token]) if token in listed else UNLISTED)
            if token != own:
                break
        return statistics.mean(found or [0.0])


ExpectedAnswers = dict[str, dict[Prompt, GreedyAnswer]]  # by version


async def ask_greedily(policy: Policy, version: str, prompts: Sequence[Prompt]) -> dict[Prompt, GreedyAnswer]:
    """Ask `version` for a greedy answer to each prompt, bypassing the prefix cache. Call it while the server is idle."""
    found = {}
    asked = {
        "model": policy.admin.find_served_name(version),
        "max_tokens": policy.fixed_tokens or policy.config.max_tokens,
        "temperature": 0.0,
    }
    asked |= {
        "ignore_eos": policy.fixed_tokens is not None,
        "logprobs": TOP_LOGPROBS,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    for prompt in prompts:
        body = asked | {"prompt": list(prompt), "cache_salt": new_id()}
        choices = [choice async for event in policy.admin.stream("/v1/completions", body) for choice in event["choices"]]
        ids = tuple(token for choice in choices for token in choice.get("token_ids") or [])
        rows = [row for choice in choices for row in (choice["logprobs"] or {}).get("top_logprobs") or []]
        listed = [{int(name.removeprefix("token_id:")): value for name, value in row.items()} for row in rows]
        found[prompt] = GreedyAnswer(ids, tuple(listed))
    return found


def compute_distances(answers: Sequence[TimedAnswer], expected: ExpectedAnswers) -> list[float]:
    """Return the distance (nats) of each answer from its version's answer on an idle server."""
    return [expected[one.version][one.prompt].distance(one.ids, one.logprobs) for one in answers]


def smallest_distance(one: dict[Prompt, GreedyAnswer], other: dict[Prompt, GreedyAnswer]) -> float:
    """Return the smallest distance (nats) between the greedy answers of two versions to the same prompt."""
    return min(
        one[prompt].distance(said.ids, [listed[token] for token, listed in zip(said.ids, said.listed, strict=True)])
        for prompt, said in other.items()
    )


def count_mixed(answers: Sequence[TimedAnswer], expected: ExpectedAnswers, limit: float) -> int:
    """Count the answers that are further than `limit` (nats) from their version's answer on an idle server."""
    return sum(distance > limit for distance in compute_distances(answers, expected))


async def go_live(deployment: Deployment, source: Path) -> PolicyVersion:
    """Register a copy of the weights in `source` as a new version, and deploy it with the real deployment."""
    version = register_copy(deployment.registry, source)
    return await deployment.deploy(version.name)


async def measure_swaps(
    deployment: Deployment,
    tokenizer: ChatTokenizer,
    sources: Sequence[Path],
    swaps: int,
    requests: int,
    concurrent: int,
    progress: Progress,
) -> dict[str, Any]:
    """Measure streaming load, first without and then with `swaps` swaps through the real deployment.

    The versions have the weights in `sources`.

    An answer is `mixed` if its distance from its version's answer on an idle server is more than half of the distance
    between versions (`versions_apart_nats`). Without swaps that distance is at most `rounding_nats`.
    """
    policy = deployment.policy
    with policy.fixed_length(LENGTH):
        prompts = make_long_prompts(tokenizer, PROMPTS)
        reached: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)  # set when that many requests are finished
        finished = 0

        def done() -> None:
            nonlocal finished
            finished += 1
            reached[finished].set()
            progress("streaming load", finished, 2 * requests)

        expected: ExpectedAnswers = {}
        said_by: list[dict[Prompt, GreedyAnswer]] = []
        for source in sources:  # the reference answers of each set of weights, while the server is idle
            version = await go_live(deployment, source)
            said_by.append(await ask_greedily(policy, version.name, prompts))
            expected[version.name] = said_by[-1]
        await run_load(policy, islice(cycle(prompts), 2 * concurrent), concurrent, lambda: None)  # warm up, not counted
        quiet, usual = [], []
        for source, said in zip(sources, said_by, strict=True):
            expected[(await go_live(deployment, source)).name] = said
            count = max(requests // len(sources), len(prompts))  # each prompt at least once, for its usual time below
            quiet.append(await run_load(policy, islice(cycle(prompts), count), concurrent, done))
            usual.append(_compute_median_seconds(quiet[-1][0]))
        swapped = asyncio.Event()
        until_swapped = takewhile(lambda _: not swapped.is_set(), cycle(prompts))
        busy = asyncio.create_task(run_load(policy, until_swapped, concurrent, done))
        usual_of = {policy.version: usual[-1]}
        for number in range(swaps):
            await reached[finished + requests // swaps].wait()
            version = await go_live(deployment, sources[number % len(sources)])
            expected[version.name] = said_by[number % len(sources)]
            usual_of[version.name] = usual[number % len(sources)]
        await reached[finished + requests // swaps].wait()
        swapped.set()
        answers, failed, seconds = await busy
        still = [answer for part, _, _ in quiet for answer in part]
        quiet_seconds = sum(part[2] for part in quiet)
        rounding, differ = max(compute_distances(still, expected)), smallest_distance(*said_by[:2])
        return {
            "swaps": len({answer.version for answer in answers}) - 1,
            "requests": len(answers) + failed,
            "failed": failed,
            "mixed": count_mixed(answers, expected, differ / 2)
            if rounding < differ / 2
            else None,  # the versions are too near to each other to tell
            "rounding_nats": rounding,
            "versions_apart_nats": differ,
            "stalled": sum(answer.seconds > STALL * usual_of[answer.version][answer.prompt] for answer in answers),
            "longest_s": max(answer.seconds for answer in answers),
            "longest_s_without_swaps": max(answer.seconds for answer in still),
            "throughput_ratio": _tokens(answers) / seconds / (_tokens(still) / quiet_seconds),
            "p99_ratio": _percentile(answers, 99) / _percentile(still, 99),
            "requests_without_swaps": len(still),
            "tokens_per_s": _tokens(answers) / seconds,
        }


def _compute_median_seconds(answers: Sequence[TimedAnswer]) -> dict[Prompt, float]:
    """Return the median time (s) of the answers to each prompt."""
    taken: defaultdict[Prompt, list[float]] = defaultdict(list)
    for answer in answers:
        taken[answer.prompt].append(answer.seconds)
    return {prompt: statistics.median(seconds) for prompt, seconds in taken.items()}


def make_long_prompts(tokenizer: ChatTokenizer, count: int) -> list[Prompt]:
    """Make prompts a little longer than a block of vLLM's prefix cache, so that a stale cache is noticed."""

    def tokenize(text: str) -> Prompt:
        return tuple(tokenizer.prompt_ids([{"role": "user", "content": text}]))

    filler = "please listen. "
    while len(tokenize(filler)) <= BLOCK:
        filler += "please listen. "
    return [tokenize(filler + text) for text, _ in toy.list_held_out_prompts()[:count]]


def _tokens(answers: Sequence[TimedAnswer]) -> int:
    return sum(len(answer.ids) for answer in answers)


def _percentile(answers: Sequence[TimedAnswer], percent: float) -> float:
    return float(np.percentile([answer.seconds for answer in answers], percent))
