"""The composition root: the only module that imports all three packages. Parts are made and joined here, nowhere else.

Run: ``kibitz COMMAND`` or ``python -m bot COMMAND``.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bot import cli
from bot.cli import ConfigFile, DataDir, JsonFile, PlotFile, Seed, app, configured, console, errors
from bot.config import Config
from bot.conversations import ConversationStore
from bot.data_directory import held
from bot.database import Database
from bot.dialogue import DialogueManager
from bot.embeddings import Embedder
from bot.errors import ConfigError, NothingToLearn
from bot.policy import Policy
from bot.registry import BASE, PolicyRegistry
from bot.tokenizer import ChatTokenizer
from bot.tracker import StateTracker
from bot.vllm_server import VllmServer
from learning.deployment import Deployment
from learning.loop import OnlineLearner

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

Announce = Callable[[str], None]
bench = typer.Typer(no_args_is_help=True, help="Measure what the project claims.")
app.add_typer(bench, name="bench")


@dataclass(frozen=True)
class Kibitz:
    """The running parts of one kibitz."""

    config: Config
    database: Database
    store: ConversationStore
    registry: PolicyRegistry
    policy: Policy
    dialogue: DialogueManager
    deployment: Deployment


@contextlib.asynccontextmanager
async def running(config: Config, announce: Announce) -> AsyncIterator[Kibitz]:
    """A kibitz that serves: database, vLLM at the live version, dialogue. Everything is stopped at the end."""
    with held(config.data, "serve"):
        model = base_model(config, announce)
        database, store, registry = cli.opened(config)
        registry.ensure_base(model)
        embedder = None if config.dialogue.embedder == "none" else Embedder(config.dialogue.embedder)
        tracker = StateTracker(store, ChatTokenizer(model), embedder, config.dialogue, config.policy.context_tokens)
        key = os.environ.get(config.serving.api_key_env, "none") if config.serving.api_key_env else "none"
        server = None if config.serving.url else VllmServer(config, model)
        policy = Policy(config.serving.url or server.url, config.policy, config.serving.reply_seconds, key)
        deployment = Deployment(policy, registry, config, announce)
        watchers: list[asyncio.Task[None]] = []
        try:
            if server is not None:
                announce(f"starting vLLM (its log: {server.log})")
                await server.start(policy)
                watchers.append(asyncio.create_task(server.watch(policy, deployment.restore)))
            await deployment.restore()
            watchers.append(asyncio.create_task(deployment.watch()))
            dialogue = DialogueManager(store, tracker, policy)
            yield Kibitz(config, database, store, registry, policy, dialogue, deployment)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await policy.close()
            if server is not None:
                await server.stop()
            if embedder is not None:
                embedder.close()
            database.close()


def base_model(config: Config, announce: Announce) -> str:
    """The base model that the config names, as something that transformers and vLLM load; the demo is made on first use."""
    name = config.policy.model
    if name == "demo":
        from learning.pretrain import DemoRecipe, make_demo

        recipe = DemoRecipe(seed=config.seed)
        if not (recipe.directory(config.data) / "config.json").exists():
            announce("making the demo policy (once, about a minute)")
            _quiet()
            with cli.progress_bar() as progress:
                make_demo(recipe, config.data, progress)
        return str(recipe.directory(config.data).absolute())
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return str(path.absolute())
    if path.is_absolute() or name.startswith(".") or path.exists() or name.count("/") > 1:
        raise ConfigError(
            f"config key policy.model has value '{name}', where there is no model (no config.json); "
            "name a model's directory, a hub model (owner/name), or 'demo'"
        )
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"config key policy.model has value '{name}', which is neither a directory nor a hub model that can be "
            "reached; check the name and the network, download it first, or use 'demo'"
        ) from error
    return name


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine; SIGTERM ends it as Ctrl-C does."""

    async def guarded() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await main

    try:
        asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _quiet() -> None:
    """Keep the libraries' own progress bars and warnings out of ours."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _learner(kibitz: Kibitz, announce: Announce, progress: cli.Report | None = None) -> OnlineLearner:
    arguments = {} if progress is None else {"progress": progress}
    return OnlineLearner(kibitz.store, kibitz.deployment, kibitz.config, announce, **arguments)


@app.command()
def chat(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Talk in the terminal; learning goes on in the background."""
    from connectors.terminal import Terminal

    found = configured(config, data_dir, seed)

    async def main() -> None:
        async with running(found, lambda text: console.print(f"* {text}")) as kibitz:
            terminal = Terminal(kibitz.dialogue, lambda turn: _why(kibitz, turn), lambda: _status(kibitz))
            kibitz.deployment.announce = terminal.announce
            learning = asyncio.create_task(_learner(kibitz, terminal.announce).run()) if found.learning.enabled else None
            try:
                await terminal.run()
            finally:
                if learning is not None:
                    learning.cancel()
                    await asyncio.gather(learning, return_exceptions=True)

    run(main())


@app.command()
def serve(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Serve and learn until stopped (Ctrl-C or SIGTERM)."""
    found = configured(config, data_dir, seed)

    def announce(text: str) -> None:
        console.print(f"* {text}")

    async def main() -> None:
        async with running(found, announce) as kibitz:
            announce(f"serving {kibitz.policy.version}; vLLM answers at {kibitz.policy.url}")
            if found.learning.enabled:
                await _learner(kibitz, announce).run()
            await asyncio.Event().wait()

    run(main())


async def _status(kibitz: Kibitz) -> str:
    return await kibitz.database.call(cli.status_text, kibitz.store, kibitz.registry)


async def _why(kibitz: Kibitz, turn_id: str) -> str:
    from learning.rewards import reward

    told = await kibitz.dialogue.explain(turn_id)
    turn = told.turn
    earned = reward(told.feedback, turn.asker_id, kibitz.config.rewards)
    used = await kibitz.database.call(kibitz.registry.runs_that_used, [row.id for row in told.feedback])
    lines = [
        f"answered by {turn.policy_version} in {turn.latency_ms:.0f} ms, {turn.finish_reason}",
        f"prompt {len(turn.prompt_ids or ())} tokens, answer {len(turn.completion_ids or ())} tokens, "
        f"log-probability {sum(turn.logprobs or ()):.2f}, sampled with {turn.sampling}",
        f"reward {earned.value:+.2f} from {len(earned.opinions)} people" if earned else "no reward yet",
    ]
    return "\n".join([*lines, f"taught {', '.join(used)}" if used else "has taught nothing yet"])


@app.command()
def pretrain(
    pairs: Annotated[Path | None, typer.Argument(help="JSON lines of messages, or the Cornell corpus's folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the new model goes; under the data directory if not given.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 5e-4,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Make the demo policy, or tune the configured model on your own prompt-response pairs."""
    from learning import importers
    from learning.pretrain import warm_start

    found = configured(config, data_dir, seed)
    cli.check_writable(json_file, out)
    _quiet()
    if pairs is None:
        console.print(f"model: {base_model(found, console.print)}")
        return
    dialogues = list(importers.pairs(pairs))
    if len(dialogues) < 2:
        raise ConfigError(f"{pairs}: holds {len(dialogues)} pairs; at least 2 are needed, one is held out")
    model = base_model(found, console.print)
    directory = out or found.data / "models" / f"pretrained-{pairs.stem}"
    with cli.progress_bar() as progress:
        measures = warm_start(model, dialogues, directory, found.seed, epochs, learning_rate, progress)
    table = Table("measure on held-out pairs", "value")
    for name, value in measures.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    console.print(f"model: {directory}\nuse it with [policy] model = \"{directory}\" and a new data directory", markup=False)
    cli.write_json(json_file, "pretrain", measures, {"pairs": str(pairs), "base": model, "epochs": epochs})


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
    _quiet()
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
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


@app.command()
def simulate(
    users: Annotated[str, typer.Option(help="Built-in users, or a file with utility(prompt, reply).")] = "lively",
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    messages: Annotated[int, typer.Option(min=1, help="Exchanges a round.")] = 240,
    reaction_rate: Annotated[float, typer.Option(min=0, max=1, help="How often a user reacts.")] = 0.3,
    noise: Annotated[float, typer.Option(min=0, max=1, help="How often a reaction is the wrong one.")] = 0.1,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each held-out prompt when judging.")] = 3,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Simulated users with hidden preferences talk, react, and are learned from."""
    from learning import simulation

    found = configured(config, data_dir, seed)
    cli.check_writable(json_file, plot)
    utility = simulation.users(users)
    setup = {"users": users, "rounds": rounds, "messages": messages, "reaction_rate": reaction_rate, "noise": noise}
    setup |= {"samples": samples, "seed": found.seed, "model": found.policy.model}
    setup |= {"training": found.training.model_dump(), "gate": found.gate.model_dump()}
    rows: list[simulation.Row] = []

    async def main() -> None:
        async with running(found, console.print) as kibitz:
            with cli.progress_bar() as progress:
                learner = _learner(kibitz, console.print, progress)
                play = simulation.Simulation(
                    kibitz.dialogue, kibitz.policy, learner, utility, found.seed, reaction_rate, noise, progress
                )
                rows.extend(await play.run(rounds, messages, samples, _show_row))

    run(main())
    console.print(_versions_table(rows))
    if plot is not None:
        simulation.plot(rows, plot, f"users: {users}, {noise:.0%} noise, {reaction_rate:.0%} react")
        console.print(f"learning curve: {plot}")
    cli.write_json(json_file, "simulate", simulation.figures(rows), setup)


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
    _quiet()
    model = base_model(found, console.print)
    database, store, registry = cli.opened(found)
    registry.ensure_base(model)
    with cli.progress_bar() as progress:
        figures = offline.replay(recording, store, model, found, progress)
    database.close()
    _print_figures(figures)
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
    base = registry.get(BASE).base_model
    written = importers.export(store, file, tokenizer_fingerprint(base))
    database.close()
    console.print(", ".join(f"{name}: {count}" for name, count in written.items()) or "nothing was said yet")


def _print_figures(figures: dict[str, Any]) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = "\n".join(f"{count} {reason}" for reason, count in value.items()) or "nothing"
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def _show_row(row: Any) -> None:
    console.print(
        f"{row.version}: utility {row.utility:+.2f} ({row.low:+.2f} to {row.high:+.2f}), frozen {row.frozen:+.2f}, "
        f"{row.reactions} reactions {row.note}",
        markup=False,
        highlight=False,
    )


def _versions_table(rows: list[Any]) -> Table:
    table = Table(
        "version", "reactions", "true utility (95%)", "frozen control (95%)", "approval", "KL", "well-formed", title="held-out prompts"
    )
    for row in rows:
        table.add_row(
            row.version,
            str(row.reactions),
            f"{row.utility:+.2f} ({row.low:+.2f} to {row.high:+.2f})",
            f"{row.frozen:+.2f} ({row.frozen_low:+.2f} to {row.frozen_high:+.2f})",
            "" if row.approval is None else f"{row.approval:.0%}",
            f"{row.kl:.3f}",
            f"{row.well_formed:.0%}",
        )
    return table


def main() -> None:
    """The console script."""
    cli.main()


if __name__ == "__main__":
    main()
