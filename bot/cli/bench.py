"""The benchmark commands. They measure what the project claims."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bot.app import Kibitz, make_services, run, running
from bot.cli.options import (
    JsonFile,
    PlotFile,
    bench,
    command,
    path_argument,
)
from bot.config import AccessConfig, Config, DatabaseConfig
from bot.config_values import MOST_CANDIDATES
from bot.data_directory import is_locked
from bot.errors import ConfigError
from bot.memory.embedder import make_embedder
from bot.models.purpose import Purpose
from bot.output import announce, check_writable, console, print_figures, progress_bar, write_json
from bot.types import Progress
from connectors.access import Access
from learning.training.choice import prepare_model
from learning.training.pretrain import is_toy


def run_benchmark(
    name: str,
    config: Config,
    job: Callable[[Kibitz, Progress], Awaitable[dict[str, Any]]],
    json_file: Path | None,
    setup: dict[str, Any],
) -> None:
    """Run a benchmark on a serving kibitz with its own database and versions. Print the figures and write them."""
    check_writable(json_file)
    config, model = prepare_model(config)
    figures: dict[str, Any] = {}
    scratch = config.data / "bench" / "serving"  # beside the points that `bench learning` keeps
    if not is_locked(scratch, "serve"):
        shutil.rmtree(scratch, ignore_errors=True)
    apart = config.model_copy(update={"data_dir": scratch, "database": DatabaseConfig()})

    async def main() -> None:
        async with running(apart, model, announce) as kibitz:
            with progress_bar() as progress:
                figures.update(await job(kibitz, progress))

    run(main())
    print_figures(figures)
    figures["model"] = config.policy.model
    write_json(json_file, name, figures, setup | {"seed": config.seed})


@command("swap", group=bench, default_model="toy")
def bench_swap(
    config: Config,
    swaps: Annotated[int | None, typer.Option(min=1)] = None,
    requests: Annotated[
        int | None, typer.Option(min=16, help="Requests without swaps; at least as many with swaps.")
    ] = None,
    concurrent: Annotated[int, typer.Option(min=1)] = 16,
    json_file: JsonFile = None,
) -> None:
    """Swap versions under streaming load. Count failed, mixed and stalled answers, and measure the cost."""
    from learning.bench import swap

    usual = swap.choose_defaults(config.policy.model)
    swaps, requests = swaps or usual.swaps, requests or usual.requests

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=config.data) as scratch:
            sources = [Path(scratch) / f"weights-{number}" for number in range(2)]
            base = kibitz.registry.get_base().base_model
            for number, source in enumerate(sources):
                swap.save_random_version(kibitz.config, base, source, config.seed + number)
            tokenizer = kibitz.dialogue.tracker.tokenizer
            asked = swaps, requests, concurrent
            return await swap.measure_swaps(kibitz.deployment, tokenizer, sources, *asked, progress)

    run_benchmark("bench swap", config, job, json_file, {"concurrent": concurrent, "swaps": swaps, "requests": requests})


@command("overhead", group=bench, default_model="toy")
def bench_overhead(
    config: Config,
    messages: Annotated[int | None, typer.Option(min=16, help="Messages per block.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1)] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Also compare the choice from so many answers with one answer: 4,8.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the latency that DialogueManager adds to the same prompts sent directly to vLLM, and what candidates cost."""
    from learning.bench import overhead, swap

    counts = _read_counts(candidates) if candidates is not None else []
    usual = swap.choose_defaults(config.policy.model)
    alone = 0 if messages else usual.alone
    messages, blocks = messages or usual.messages, blocks or usual.blocks

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        figures = await overhead.measure_overhead(
            kibitz.dialogue, kibitz.policy, messages, blocks, config.seed, progress, alone
        )
        if counts:
            figures |= await overhead.measure_candidates(kibitz.dialogue, counts, messages, blocks, config.seed, progress)
        return figures

    setup = {"messages": messages, "blocks": blocks} | ({"candidates": counts} if counts else {})
    run_benchmark("bench overhead", config, job, json_file, setup)


def _read_counts(candidates: str) -> list[int]:
    """Return the numbers of candidates that an option lists. Raises ConfigError if one is none."""
    listed = [one.strip() for one in candidates.split(",")]
    wrong = next((one for one in listed if not (one.isdecimal() and 1 <= int(one) <= MOST_CANDIDATES)), None)
    if wrong is not None:
        raise ConfigError(f"option --candidates has value '{wrong}'; give numbers from 1 to {MOST_CANDIDATES}, such as 4,8")
    return [int(one) for one in listed]


@command("connectors", group=bench, default_model="toy")
def bench_connectors(
    config: Config,
    messages: Annotated[int, typer.Option(min=64, help="Messages per number of conversations.")] = 256,
    think: Annotated[
        float, typer.Option(min=0.1, help="Seconds that people think before a message, except at full load.")
    ] = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Measure the latency that Discord, Slack and the web add to vLLM, with a local server for each."""
    from connectors.local import benchmark
    from connectors.local.platforms import PLATFORMS

    unlimited = Access(AccessConfig(messages_per_minute=10**6, opinions_per_minute=10**6))

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for make in PLATFORMS.values():
            platform = make(make_services(kibitz, unlimited))
            figures |= await benchmark.measure(kibitz.dialogue, platform, messages, think, config.seed, progress)
        return figures

    run_benchmark("bench connectors", config, job, json_file, {"messages": messages, "think": think})


@command("recall", group=bench)
def bench_recall(
    config: Config,
    file: Annotated[Path, path_argument("Conversations with questions and their evidence, one per line.")],
    json_file: JsonFile = None,
) -> None:
    """Measure how well recall finds the turns that answer a question, against recency, dense vectors and BM25."""
    from bot.memory.recall import load_retrieval_weights
    from learning.bench import recall

    check_writable(json_file)
    asked = recall.read(file)
    learned = load_retrieval_weights(config.dialogue.retrieval_weights)
    with progress_bar() as progress:
        figures = asyncio.run(recall.measure(asked, make_embedder(config.dialogue, config.data), learned, progress))
    print_figures(figures)
    write_json(json_file, "bench recall", figures, {"file": file.name, "embedder": config.dialogue.embedder})


@command("learning", group=bench, default_model="toy")
def bench_learning(
    config: Config,
    part: Annotated[
        str,
        typer.Option(
            "--slice",
            help="few, corrections, hacking or ci (objectives): minutes on two cores; rates, regimes or full: hours.",
        ),
    ] = "full",
    arms: Annotated[str | None, typer.Option(help="Objectives and controls, separated by commas. Default: all.")] = None,
    users: Annotated[str | None, typer.Option(help="Built-in users, or a Python file with utility(prompt, reply).")] = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Measure what each objective learns from simulated reactions, against a frozen and a placebo control."""
    from learning.bench import grid, simulated_people
    from learning.bench.slices import find_slice

    check_writable(json_file, plot)
    if users is not None:
        simulated_people.find_utility(users)  # raises before anything runs
    chosen = find_slice(part, users, arms, config, is_toy(config.policy.model))
    kept = config.data / "bench" / f"learning-{part}.jsonl"
    config, base = prepare_model(config, purpose=Purpose.TRAIN)
    with progress_bar() as progress:
        found = chosen.run(config, base, kept, progress)
    figures = chosen.compute_figures(found)
    print_figures(figures)
    if plot is not None:
        chosen.plot(found, plot)
        console.print(f"plot: {plot}")
    setup = {"slice": part, "arms": arms, "users": users, "seeds": grid.SEEDS, "seed": config.seed}
    setup["model"] = config.policy.model
    write_json(json_file, "bench learning", figures, setup | {"training": config.training.model_dump()})


@command("train", group=bench, default_model="toy")
def bench_train(
    config: Config,
    json_file: JsonFile = None,
) -> None:
    """Measure the time and memory of each objective, against a plain TRL script on the same rows."""
    from learning.bench import train

    check_writable(json_file)
    config, base = prepare_model(config, purpose=Purpose.TRAIN)
    with progress_bar() as progress:
        figures = train.measure(config, base, progress)
    print_figures(figures)
    write_json(json_file, "bench train", figures, {"model": config.policy.model, "rows": train.SIZE.rows})


@command("tracker", group=bench, default_model="toy")
def bench_tracker(
    config: Config,
    sizes: Annotated[
        str, typer.Option(help="Stored turns (1e3, 1e5, 1e6) or mentions in one channel (2k, 150k), separated by commas.")
    ] = "1e3,1e5,1e6,150k",
    json_file: JsonFile = None,
) -> None:
    """Measure what recall costs per message, with up to a million stored turns and with one large channel."""
    from learning.bench import tracker

    check_writable(json_file)
    wanted = [size.strip() for size in sizes.split(",")]
    known = [*tracker.SIZES, *tracker.CHANNELS]
    unknown = [size for size in wanted if size not in known]
    if unknown:
        raise ConfigError(f"option --sizes has value '{unknown[0]}'; choose from {', '.join(known)}")
    config, base = prepare_model(config, purpose=Purpose.READ)
    with progress_bar() as progress:
        figures = tracker.measure_apart(config.policy, config.dialogue, config.data, base, wanted, progress)
    print_figures(figures)
    write_json(json_file, "bench tracker", figures, {"embedder": config.dialogue.embedder, "sizes": wanted})
