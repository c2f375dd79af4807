"""The commands that train: a warm start, one run, or a replay of recorded conversations."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bot.cli.options import (
    JsonFile,
    PlotFile,
    choose_model,
    command,
    path_argument,
    path_option,
)
from bot.config import Config
from bot.errors import ConfigError, NothingToLearn
from bot.models.purpose import Purpose
from bot.output import announce, check_writable, console, print_figures, progress_bar, write_json
from bot.store.stores import open_stores
from bot.wording import count_noun
from learning.training import pretrain as pretraining
from learning.training.choice import prepare_model

if TYPE_CHECKING:
    from learning.judging.judgement import Judgement


@command()
def pretrain(
    config: Config,
    pairs: Annotated[Path | None, path_argument("JSON lines of messages, or the folder of the Cornell corpus.")] = None,
    out: Annotated[Path | None, path_option("--out", help="The model's directory. Default: below --data-dir.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    json_file: JsonFile = None,
) -> None:
    """Make the toy policy, or fine-tune the configured model on prompt-response pairs."""
    from learning.importers.pairs import read_pairs as read_pairs

    check_writable(json_file)
    if out is not None:
        pretraining.check_output_directory(out)
    if pairs is None:
        console.print(f"model: {prepare_model(choose_model(config, 'toy'))[1]}")
        return
    dialogues = list(read_pairs(pairs))
    if len(dialogues) < 2:
        raise ConfigError(f"{pairs}: has {count_noun(len(dialogues), 'pair')}; give at least 2, one is held out")
    config, model = prepare_model(config, purpose=Purpose.READ)
    directory = out or config.data / "models" / f"pretrained-{pairs.stem}"
    with progress_bar() as progress:
        recipe = config.seed, epochs, learning_rate, progress, config.policy.template_args
        measures = pretraining.warm_start(model, dialogues, directory, *recipe)
    print_figures(measures)
    console.print(f'model: {directory}\nuse it: [policy] model = "{directory}", with a new data directory', markup=False)
    write_json(json_file, "pretrain", measures, {"pairs": pairs.name, "epochs": epochs, "seed": config.seed})


@command()
def train(
    config: Config,
    progress: Annotated[
        Literal["bar", "json"], typer.Option(help="How to show progress. json is for a parent process.")
    ] = "bar",
    deploy: Annotated[bool, typer.Option("--deploy", help="Deploy the candidate if it passes the gate.")] = False,
    judge: Annotated[bool, typer.Option("--judge", help="Train nothing. Judge the waiting candidate again.")] = False,
) -> None:
    """Train one candidate and judge it. `kibitz deploy` makes it live."""
    from learning.judging.waiting import judge_waiting
    from learning.training.run import train_version

    is_told = progress == "json"  # the parent process has announced the model already
    tell = (lambda text: None) if is_told else announce
    config, model = prepare_model(config, tell, Purpose.TRAIN)
    database, _, registry = open_stores(config)
    registry.ensure_base(model)
    database.close()

    def work(report: Callable[[str, int, int], None]) -> "Judgement":
        return judge_waiting(config, report) if judge else train_version(config, report, is_deployment_requested=deploy)

    if progress != "json":
        with progress_bar() as report:
            outcome = work(report)
        verdict = "passed the gate" if outcome.passed else "; ".join(outcome.reasons)
        console.print(f"{outcome.policy}: {verdict}{'; it waits for more reactions' if outcome.waits else ''}")
        return
    try:
        _write_line(outcome=work(lambda stage, done, total: _write_line(stage=stage, done=done, total=total)).as_json())
    except NothingToLearn as error:
        _write_line(nothing_to_learn=str(error))


def _write_line(**values: Any) -> None:
    """Write one line of JSON for the parent process."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


@command(default_model=None)
def replay(
    config: Config,
    file: Annotated[Path, path_argument("Recorded conversations with reactions: a file, a directory or a ZIP file.")],
    format: Annotated[str, typer.Option(help="The file format. auto detects it; an unknown name lists all.")] = "auto",
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Import recorded conversations, train a candidate on them, and judge it."""
    from learning.importers import formats
    from learning.training import replay as offline

    check_writable(json_file, plot)
    recording = formats.read_recording(file, format, config.reactions)
    for line in recording.lines():
        announce(line)
    config, base = prepare_model(config, purpose=Purpose.REPLAY)
    database, store, registry = open_stores(config)
    registry.ensure_base(base)
    with progress_bar() as progress:
        figures = offline.replay(recording, store, base, config, progress)
    database.close()
    print_figures(figures)
    if plot is not None:
        offline.plot(figures, plot)
        console.print(f"plot: {plot}")
    setup = {"file": file.name, "format": recording.format, "seed": config.seed, "model": config.policy.model}
    write_json(json_file, "replay", figures, setup | {"training": config.training.model_dump()})
