"""The benchmarks that need no server: recall, tracker, objectives, training runs.

Each command is a few lines over a function elsewhere. Those that serve are in `bot.__main__`.
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from bot import cli
from bot.cli import ConfigFile, DataDir, JsonFile, ModelName, PlotFile, Seed, bench, configured
from bot.embeddings import embedder_of
from bot.errors import ConfigError
from bot.output import check_writable, console, print_figures, progress_bar, write_json
from learning.commands import with_model


@bench.command("recall")
def bench_recall(
    file: Annotated[Path, cli.path_argument("Conversations with questions and their evidence, one a line.")],
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Whether the tracker finds the turns that answer a question, beside recency, dense vectors alone and BM25 alone."""
    from bot.recall import weights
    from learning import recall_benchmark

    found = configured(config, data_dir, seed)
    check_writable(json_file)
    asked = recall_benchmark.read(file)
    with progress_bar() as progress:
        figures = asyncio.run(
            recall_benchmark.measure(asked, embedder_of(found), weights(found.dialogue.retrieval_weights), progress)
        )
    print_figures(figures)
    write_json(json_file, "bench recall", figures, {"file": file.name, "embedder": found.dialogue.embedder})


@bench.command("learning")
def bench_learning(
    part: Annotated[str, typer.Option("--slice", help="ci (some ten minutes), rates, regimes or full (hours).")] = "full",
    arms: Annotated[str | None, typer.Option(help="Objectives and controls, with commas between; all if not given.")] = None,
    users: Annotated[str | None, typer.Option(help="Built-in users, or a Python file with utility(prompt, reply).")] = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What each objective learns from simulated people's reactions, beside a frozen and a placebo control."""
    from learning import learning_grid, simulated_people

    found = configured(config, data_dir, seed, model)
    check_writable(json_file, plot)
    if users is not None:
        simulated_people.users(users)  # refused here, before anything runs
    wanted = learning_grid.cells(part, users, arms, found.seed)
    found, base = with_model(found, serves=False)
    with progress_bar() as progress:
        points = learning_grid.run(found, base, wanted, found.data / "bench" / f"learning-{part}.jsonl", progress)
    figures = learning_grid.figures(points, found.training.objective)
    print_figures(figures)
    if plot is not None:
        learning_grid.plot(points, plot)
        console.print(f"plot: {plot}")
    setup = {"slice": part, "arms": arms, "users": users, "seeds": learning_grid.SEEDS, "seed": found.seed}
    setup["model"] = found.policy.model
    write_json(json_file, "bench learning", figures, setup | {"training": found.training.model_dump()})


@bench.command("train")
def bench_train(
    json_file: JsonFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What each objective costs in time and memory, against a plain TRL script on the same rows."""
    from learning import train_benchmark

    found = configured(config, data_dir, seed, model)
    check_writable(json_file)
    found, base = with_model(found, serves=False)
    with progress_bar() as progress:
        figures = train_benchmark.measure(found, base, progress)
    print_figures(figures)
    write_json(json_file, "bench train", figures, {"model": found.policy.model, "rows": train_benchmark.SIZE.rows})


@bench.command("tracker")
def bench_tracker(
    sizes: Annotated[
        str, typer.Option(help="Stored turns (1e3, 1e5, 1e6) and mentions in one channel (2k, 150k), with commas between.")
    ] = "1e3,1e5,1e6,150k",
    json_file: JsonFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What remembering costs: a message, with a thousand to a million stored turns, and one channel that has grown."""
    from learning import tracker_benchmark

    found = configured(config, data_dir, seed, model)
    check_writable(json_file)
    wanted = [size.strip() for size in sizes.split(",")]
    known = [*tracker_benchmark.SIZES, *tracker_benchmark.CHANNELS]
    unknown = [size for size in wanted if size not in known]
    if unknown:
        raise ConfigError(f"--sizes has value '{unknown[0]}'; choose from {', '.join(known)}")
    found, base = with_model(found, serves=False)
    with progress_bar() as progress:
        figures = tracker_benchmark.measure_apart(found, base, wanted, progress)
    print_figures(figures)
    write_json(json_file, "bench tracker", figures, {"embedder": found.dialogue.embedder, "sizes": wanted})
