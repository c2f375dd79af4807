"""The commands that need no server: warm start, a training run, offline replay, export.

Each is a few lines over a function elsewhere. The commands that serve are in `bot.__main__`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bot import cli
from bot.cli import ConfigFile, DataDir, JsonFile, PlotFile, Seed, announce, app, configured, console, errors
from bot.config import Config
from bot.errors import ConfigError, NothingToLearn
from bot.registry import BASE
from learning import pretrain as pretraining

Announce = Callable[[str], None]


def base_model(config: Config, tell: Announce = announce) -> str:
    """The base model that the config names, as something that transformers and vLLM load; the demo is made on first use."""
    with cli.progress_bar() as progress:
        return pretraining.base_model(config, tell, progress)


@app.command()
def pretrain(
    pairs: Annotated[Path | None, typer.Argument(help="JSON lines of messages, or the Cornell corpus's folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the model goes; under the data directory if not given.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Make the demo policy, or tune the configured model on your own prompt-response pairs."""
    from learning import importers

    found = configured(config, data_dir, seed)
    cli.check_writable(json_file, out)
    if pairs is None:
        console.print(f"model: {base_model(found)}")
        return
    dialogues = list(importers.pairs(pairs))
    if len(dialogues) < 2:
        raise ConfigError(f"{pairs}: holds {len(dialogues)} pairs; at least 2 are needed, one is held out")
    model = base_model(found)
    directory = out or found.data / "models" / f"pretrained-{pairs.stem}"
    with cli.progress_bar() as progress:
        measures = pretraining.warm_start(model, dialogues, directory, found.seed, epochs, learning_rate, progress)
    cli.print_figures(measures)
    console.print(f'model: {directory}\nuse it: [policy] model = "{directory}", with a new data directory', markup=False)
    cli.write_json(json_file, "pretrain", measures, {"pairs": pairs.name, "epochs": epochs, "seed": found.seed})


@app.command()
def train(
    progress: Annotated[str, typer.Option(help="How to report: bar, or json for a parent process.")] = "bar",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """One training run now; registers a candidate with its verdict, and deploys nothing."""
    from learning import trainer

    found = configured(config, data_dir, seed)
    database, _, registry = cli.opened(found)
    registry.ensure_base(base_model(found, errors.print))
    database.close()
    if progress != "json":
        with cli.progress_bar() as report:
            outcome = trainer.run(found, report)
        console.print(f"{outcome.policy}: {'passed the gate' if outcome.passed else '; '.join(outcome.reasons)}")
        return
    try:
        outcome = trainer.run(found, lambda stage, done, total: _tell(stage=stage, done=done, total=total))
        _tell(outcome=asdict(outcome))
    except NothingToLearn as error:
        _tell(nothing_to_learn=str(error))


def _tell(**values: Any) -> None:
    """One line for the parent process."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="Recorded conversations with reactions, one a line.")],
    format: Annotated[str, typer.Option(help="auto, kibitz, openai or oasst.")] = "auto",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Offline replay training: import recorded conversations, train on them, gate, and report."""
    from learning import importers
    from learning import replay as offline

    found = configured(config, data_dir, seed)
    cli.check_writable(json_file, plot)
    recording = importers.read(file, format)
    model = base_model(found)
    database, store, registry = cli.opened(found)
    registry.ensure_base(model)
    with cli.progress_bar() as progress:
        figures = offline.replay(recording, store, model, found, progress)
    database.close()
    cli.print_figures(figures)
    if plot is not None:
        offline.plot(figures, plot)
        console.print(f"plot: {plot}")
    setup = {"file": file.name, "format": recording.format, "seed": found.seed, "model": found.policy.model}
    cli.write_json(json_file, "replay", figures, setup | {"training": found.training.model_dump()})


@app.command()
def export(file: Path, config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Write every conversation with its feedback to FILE, in the form that `kibitz replay` reads."""
    from learning import importers
    from learning.replay import tokenizer_fingerprint

    found = configured(config, data_dir, seed)
    cli.check_writable(file)
    database, store, registry = cli.opened(found)
    written = importers.export(store, file, tokenizer_fingerprint(registry.get(BASE).base_model), found.privacy)
    database.close()
    console.print(", ".join(f"{name}: {count}" for name, count in written.items()) or "nothing was said yet")
