"""The commands that need no server: warm start, a training run, offline replay, export.

Each is a few lines over a function elsewhere. The commands that serve are in `bot.__main__`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from bot import cli, output_files
from bot.cli import ConfigFile, DataDir, JsonFile, ModelName, PlotFile, Seed, app, configured
from bot.config import Config
from bot.data_directory import is_held
from bot.embeddings import Embedder, embedder_of
from bot.errors import ConfigError, DataError, NothingToLearn, VerdictOutdated
from bot.output import announce, check_writable, console, print_figures, progress_bar, write_json
from bot.registry import PolicyRegistry
from bot.stores import open_stores
from bot.texts import waiting_text
from bot.types import PolicyState
from learning import pretrain as pretraining
from learning import version_files
from learning.model_choice import with_model

if TYPE_CHECKING:
    from learning.waiting import Judgement


@app.command()
def pretrain(
    pairs: Annotated[Path | None, cli.path_argument("JSON lines of messages, or the Cornell corpus's folder.")] = None,
    out: Annotated[Path | None, cli.path_option("--out", help="Where the model goes; below --data-dir by default.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Make the toy policy, or tune the configured model on your own prompt-response pairs."""
    from learning.pairs import pairs as read_pairs

    found = configured(config, data_dir, seed)
    check_writable(json_file)
    if out is not None:
        pretraining.check_place(out)
    if pairs is None:
        console.print(f"model: {with_model(configured(config, data_dir, seed, 'toy'))[1]}")
        return
    dialogues = list(read_pairs(pairs))
    if len(dialogues) < 2:
        raise ConfigError(f"{pairs}: holds {len(dialogues)} pairs; at least 2 are needed, one is held out")
    found, model = with_model(found)
    directory = out or found.data / "models" / f"pretrained-{pairs.stem}"
    with progress_bar() as progress:
        recipe = found.seed, epochs, learning_rate, progress, found.policy.template_args
        measures = pretraining.warm_start(model, dialogues, directory, *recipe)
    print_figures(measures)
    console.print(f'model: {directory}\nuse it: [policy] model = "{directory}", with a new data directory', markup=False)
    write_json(json_file, "pretrain", measures, {"pairs": pairs.name, "epochs": epochs, "seed": found.seed})


@app.command()
def train(
    progress: Annotated[str, typer.Option(help="How to report: bar, or json for a parent process.")] = "bar",
    deploy: Annotated[bool, typer.Option("--deploy", help="Have what passes the gate deployed.")] = False,
    judge: Annotated[bool, typer.Option("--judge", help="Train nothing; judge the candidate that waits.")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """One training run now; registers a candidate with its verdict, which `kibitz deploy` takes live."""
    from learning import trainer
    from learning.waiting import judge_waiting

    is_told = progress == "json"  # by whoever started this process, who has told of the model already
    tell = (lambda text: None) if is_told else announce
    found, model = with_model(configured(config, data_dir, seed), tell, serves=False)
    database, _, registry = open_stores(found)
    registry.ensure_base(model)
    database.close()

    def work(report: Callable[[str, int, int], None]) -> "trainer.Outcome | Judgement":
        return judge_waiting(found, report) if judge else trainer.run(found, report, deploys=deploy)

    if progress != "json":
        with progress_bar() as report:
            outcome = work(report)
        verdict = "passed the gate" if outcome.passed else "; ".join(outcome.reasons)
        console.print(f"{outcome.policy}: {verdict}{'; it waits for more reactions' if outcome.waits else ''}")
        return
    try:
        _tell(outcome=asdict(work(lambda stage, done, total: _tell(stage=stage, done=done, total=total))))
    except NothingToLearn as error:
        _tell(nothing_to_learn=str(error))


@app.command()
def deploy(
    version: Annotated[str, typer.Argument(help="A candidate that `kibitz train` or `kibitz replay` made.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Take a candidate live: a running kibitz, or the next one that starts, proves it on its vLLM first."""
    found = configured(config, data_dir, seed)
    database, store, registry = open_stores(found)
    candidate, live = registry.get(version), registry.live()
    is_waiting = candidate.state == PolicyState.WAITING
    if (is_waiting or candidate.state == PolicyState.CANDIDATE) and candidate.judged_against != live.name:
        raise VerdictOutdated(version, candidate.judged_against, live.name)
    registry.request_deployment(version)
    if is_waiting:
        told = f"{waiting_text(candidate, store)}; if it passes the gate then, it is proven and goes live"
    else:
        when = "is proven now" if is_held(found.data, "serve") else "will be proven when kibitz starts"
        told = f"{version} {when}, and goes live if vLLM serves it as it was trained; `kibitz policies` tells"
    database.close()
    console.print(told)


@app.command()
def prune(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Remove what is left of rejected versions: reports, samples, records. Their weights went when they were rejected."""
    found = configured(config, data_dir, seed)
    database, _, registry = open_stores(found)
    rejected = [Path(version.path) for version in registry.all() if version.state == PolicyState.REJECTED]
    count, size = version_files.prune(rejected)
    database.close()
    console.print(f"removed the files of {count} rejected versions, {size / 1e6:.1f} MB")


def _tell(**values: Any) -> None:
    """One line for the parent process."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


@app.command()
def replay(
    file: Annotated[Path, cli.path_argument("Recorded conversations with reactions: a file, a directory or a ZIP.")],
    format: Annotated[str, typer.Option(help="auto finds it out; a name that is not known lists those that are.")] = "auto",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    model: ModelName = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Offline replay training: import recorded conversations, train on them, gate, and report."""
    from learning import importers
    from learning import replay as offline

    found = configured(config, data_dir, seed, model)
    check_writable(json_file, plot)
    recording = importers.read(file, format, found.reactions)
    for line in recording.lines():
        announce(line)
    found, base = with_model(found, serves=False, replays=True)
    database, store, registry = open_stores(found)
    registry.ensure_base(base)
    with progress_bar() as progress:
        figures = offline.replay(recording, store, base, found, progress)
    database.close()
    print_figures(figures)
    if plot is not None:
        offline.plot(figures, plot)
        console.print(f"plot: {plot}")
    setup = {"file": file.name, "format": recording.format, "seed": found.seed, "model": found.policy.model}
    write_json(json_file, "replay", figures, setup | {"training": found.training.model_dump()})


@app.command()
def why(
    turn: Annotated[str, typer.Argument(help="A turn's id; without one the latest that people spoke of are listed.")] = "",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Why an answer is what it is, what people said of it, and which versions learned from that."""
    from bot.tokenizer import ChatTokenizer
    from learning.explanation import explain
    from learning.replay_buffer import ReplayBuffer

    found = configured(config, data_dir, seed)
    database, store, registry = open_stores(found)
    if turn:
        tokenizer = ChatTokenizer(_spoken_model(registry), found.policy.template_args)
        for line in explain(turn, ReplayBuffer(store, tokenizer, found), registry).lines():
            console.print(line, markup=False, highlight=False)
    else:
        table = Table("turn", "version", "answer")
        for one in store.turns_with_feedback(newest=20):
            table.add_row(one.id, one.policy_version, Text(" ".join(one.text[:200].split())[:60]))
        console.print(table)
    database.close()


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="The version that the run made; without one the newest that left files.")] = "",
    out: Annotated[Path | None, cli.path_option("--out", help="Where the page goes; RUN.html if not given.")] = None,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What a training run read, learned and left out, and what the policy said before and after, as a page with plots."""
    from learning import report as reports

    found = configured(config, data_dir, seed)
    database, _, registry = open_stores(found)
    ran = {row["policy"]: row["outcome"] for row in registry.runs()}
    if not ran:
        raise ConfigError("kibitz report: there was no training run yet; `kibitz train` makes one")
    whole = [one for one in ran if (Path(registry.get(one).path) / "manifest.json").is_file()]
    name = run or (whole or list(ran))[-1]
    version = registry.get(name)
    page = out or Path(f"{name}.html")
    check_writable(page, json_file)
    collected = reports.collected(version, ran.get(name, "was not made by a run"))
    database.close()
    output_files.write_text(page, reports.html(collected))
    console.print(f"report: {page}")
    if json_file is not None:
        write_json(json_file, "report", collected, {"run": name})


@app.command()
def export(
    file: Annotated[Path, cli.path_argument("The file to write; an older one there is replaced.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Write every conversation that may teach, with its feedback, to FILE, in the form that `kibitz replay` reads."""
    from learning import kibitz_export
    from learning.replay import tokenizer_fingerprint

    found = configured(config, data_dir, seed)
    check_writable(file)
    database, store, registry = open_stores(found)
    written = kibitz_export.export(store, file, tokenizer_fingerprint(_spoken_model(registry)), found.privacy)
    database.close()
    console.print(", ".join(f"{name}: {count}" for name, count in written.items()) or "nothing was said yet")


def _spoken_model(registry: PolicyRegistry) -> str:
    """The model that people talked with. Raises DataError where nobody talked yet: none is chosen before that."""
    if not registry.directories():
        raise DataError("nothing was said yet in this data directory; talk with `kibitz chat`, or name another --data-dir")
    return registry.base().base_model


def _embedder(config: Config) -> Embedder:
    """The embedding model, for what cannot be learned without one."""
    found = embedder_of(config)
    if found is None:
        raise ConfigError("config key dialogue.embedder has value 'none'; name a model to learn with")
    return found


@app.command("fit-retrieval")
def fit_retrieval(
    out: Annotated[Path | None, cli.path_option("--out", help="Where the weights go.")] = None,
    dialogues: Annotated[int, typer.Option(min=1, help="How many dialogues to make and learn from.")] = 24,
    from_feedback: Annotated[
        bool, typer.Option("--from-feedback", help="Learn from the answers that people judged.")
    ] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Learn what each signal of retrieval counts: from dialogues that are made here, or from what your people liked."""
    from learning import retrieval_training
    from learning.dialogues import dialogue

    found = configured(config, data_dir, seed)
    check_writable(out)
    embedder = _embedder(found)
    setup: dict[str, Any] = {"seed": found.seed, "embedder": found.dialogue.embedder}
    with progress_bar() as progress:
        if from_feedback:
            learned, setup["judged"] = _from_feedback(found, embedder, progress)
        else:
            made = (dialogue(1000 * found.seed + number, people=(2, 6, 12)[number % 3]) for number in range(dialogues))
            learned = retrieval_training.fit(list(retrieval_training.made_examples(made, embedder, progress)))
            setup["dialogues"] = dialogues
    print_figures(learned)
    if out is not None:
        output_files.write_text(out, json.dumps({"weights": learned, "setup": setup}, indent=2) + "\n")


def _from_feedback(config: Config, embedder: Embedder, progress: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """The weights in use, moved by what people judged, and how well they do where they did not learn."""
    from bot.memory import Memory
    from bot.recall import weights
    from bot.tokenizer import ChatTokenizer
    from learning import reminders, retrieval_training
    from learning.replay_buffer import ReplayBuffer

    database, store, _ = open_stores(config)
    config, model = with_model(config)
    rated = ReplayBuffer(store, ChatTokenizer(model, config.policy.template_args), config).rated()
    memory = Memory(database, config.dialogue.across_channels)
    judged = list(reminders.judged(rated, store, memory, embedder, progress))
    return retrieval_training.proven(judged, weights(config.dialogue.retrieval_weights))


@app.command("fit-topics")
def fit_topics(
    train: Annotated[Path, cli.path_argument("Dialogues with marked topics, in TIAGE's form.")],
    test: Annotated[Path, cli.path_option("--test", help="Others, to judge by.")],
    out: Annotated[Path | None, cli.path_option("--out", help="Where the weights go.")] = None,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Learn where conversations turn to another topic, from dialogues in which people marked it."""
    from learning import topic_training as topics

    found = configured(config, data_dir, seed)
    check_writable(out, json_file)
    embedder = _embedder(found)
    known, unknown = topics.read(train), topics.read(test)
    with progress_bar() as progress:
        learned, figures = topics.judged(known, unknown, embedder, progress)
    print_figures(figures)
    write_json(json_file, "fit-topics", figures, {"train": train.name, "test": test.name})
    if out is not None:
        output_files.write_text(out, json.dumps(learned, indent=2) + "\n")


@app.command("fit-followups")
def fit_followups(
    out: Annotated[Path | None, cli.path_option("--out", help="Where the weights go.")] = None,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Learn what people mean by what they say after an answer, from phrases that come with kibitz."""
    from learning import followup_training

    found = configured(config, data_dir, seed)
    check_writable(out, json_file)
    embedder = _embedder(found)
    with progress_bar() as progress:
        learned, figures = followup_training.fit(found.seed, embedder, progress)
    print_figures(figures)
    write_json(json_file, "fit-followups", figures, {"seed": found.seed, "embedder": found.dialogue.embedder})
    if out is not None:
        output_files.write_text(out, json.dumps(learned) + "\n")
