"""The command line: shared options, progress bars, the error boundary, and the commands that need only the bot.

Commands that train, simulate or connect are added by `bot.__main__`; each command is a few lines over a function elsewhere.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bot import config as configuration
from bot import environment, output_files
from bot.config import Config
from bot.data_directory import HEALTH, is_held, prepare
from bot.embeddings import embedder_of
from bot.errors import ConfigError, KibitzError, cause_of
from bot.output import console, errors
from bot.state import LATEST, derived
from bot.stores import open_stores
from bot.supervision import failing_lines, read_failing
from bot.texts import pause_text, state_text, status_text
from bot.types import PolicyState

INTERRUPTED = 130
BAD_INPUT = 2  # the exit code of every error that the person at the keyboard can put right

app = typer.Typer(
    name="kibitz",
    help="A chatbot that learns from its users' reactions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(no_args_is_help=True, help="Measure what the project claims.")
app.add_typer(bench, name="bench")


def path_option(*names: str, help: str, parser: Callable[[str], Path] = environment.read_path) -> Any:
    """An option for a path; a `~` at its beginning is the home directory, as the shell does not see it in `--out=~/x`."""
    return typer.Option(*names, help=help, parser=parser, metavar="<path>")


def path_argument(help: str) -> Any:
    """An argument that is a path, read as those of options are."""
    return typer.Argument(help=help, parser=environment.read_path)


def _read_plot(text: str) -> Path:
    path = environment.read_path(text)
    output_files.check_replaceable(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"option --plot has value '{text}', which is no PNG file; name one that ends in .png")
    return path


ConfigFile = Annotated[Path | None, path_option("--config", help="The config file; ./config.toml if there is one.")]
DataDir = Annotated[Path | None, path_option("--data-dir", help="Everything that kibitz writes is under it.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The seed of everything that is drawn.")]
ModelName = Annotated[str | None, typer.Option("--model", help="toy, builtin, a model's directory or a hub name.")]
JsonFile = Annotated[Path | None, path_option("--json", help="Write the figures to this file.")]
PlotFile = Annotated[Path | None, path_option("--plot", help="Draw the result into this PNG file.", parser=_read_plot)]


def configured(config: Path | None, data_dir: Path | None, seed: int | None, model: str | None = None) -> Config:
    """The config of a command, with its options on top and a data directory that can be written."""
    if config is None and Path("config.toml").exists():
        config = Path("config.toml")
    found = configuration.load(config, data_dir=None if data_dir is None else str(data_dir), seed=seed)
    if model is not None:
        chosen = {"model": environment.expand_home(model)}
        found = found.model_copy(update={"policy": found.policy.model_copy(update=chosen)})
    prepare(found.data)
    environment.ensure_user(found.data)
    return found


@app.command()
def state(
    conversation: Annotated[str, typer.Argument(help="A conversation's id; without one the latest are listed.")] = "",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What a conversation is about, who takes part, what is open, what people said of themselves."""
    found = configured(config, data_dir, seed)
    database, store, _ = open_stores(found)
    if conversation:
        said = store.messages(store.conversation(conversation).id, LATEST)
        console.print(state_text(derived(said, embedder_of(found))), markup=False)
    else:
        table = Table("conversation", "platform", "channel", "thread", "messages", "last")
        for one, messages, last in store.latest(20):
            table.add_row(one.id, one.platform, one.channel, one.thread, str(messages), f"{last:%Y-%m-%d %H:%M}")
        console.print(table)
    database.close()


@app.command()
def policies(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """List every policy version."""
    _, _, registry = open_stores(configured(config, data_dir, seed))
    table = Table("version", "state", "parent", "KL", "gain", "made", "why not")
    for version in registry.all():
        figures = version.metrics
        table.add_row(
            version.name,
            f"[bold green]{version.state}" if version.state == PolicyState.LIVE else version.state,
            version.parent or "",
            _number(figures.get("kl")),
            _number(figures.get("gain")),
            f"{version.created_at:%Y-%m-%d %H:%M}",
            "; ".join(figures.get("reasons", [])) or figures.get("outcome", ""),
        )
    console.print(table)


@app.command()
def rollback(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Take the live version back; the one that it replaced answers again."""
    found = configured(config, data_dir, seed)
    _, _, registry = open_stores(found)
    taken_back, live = registry.rollback()
    running = "; the running kibitz follows at once" if is_held(found.data, "serve") else ""
    console.print(f"{taken_back.name} was taken back, {live.name} is live{running}")


@app.command("pause-learning")
def pause_learning(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Train no new versions; used again, go on. A running kibitz follows."""
    _, _, registry = open_stores(configured(config, data_dir, seed))
    console.print(pause_text(registry.pause_learning()))


@app.command()
def status(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """What is live, what was said, what was learned."""
    found = configured(config, data_dir, seed)
    is_running = is_held(found.data, "serve")
    # First: the database may be what fails.
    lines = failing_lines(read_failing(found.data / HEALTH)) if is_running else []
    console.print("\n".join([f"running: {'yes' if is_running else 'no'}", *lines]), markup=False)
    _, store, registry = open_stores(found)
    console.print(status_text(store, registry))


def main(application: typer.Typer = app) -> None:
    """Run a command; an error for people is one line and exit code 2, anything else a traceback."""
    os.umask(0o077)  # what we and our children write may hold what people said
    environment.open_standard_streams()
    try:
        environment.check_arguments(sys.argv[1:])
        code = application(standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this return value
            raise KeyboardInterrupt
    except BaseException as error:
        line = _line(_leaf(error))
        if line is None:
            raise
        if line:
            errors.print(f"kibitz: {line}", markup=False)
        sys.exit(BAD_INPUT)
    sys.exit(code or 0)


def _line(error: BaseException) -> str | None:
    """What to tell a person, or None for a bug."""
    if isinstance(error, KibitzError):
        return cause_of(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "interrupted; what was said and stored is kept, an unfinished training run left nothing behind"
    if hasattr(error, "format_message"):  # a usage error of typer's, which keeps its own copy of click
        said = error.format_message()  # empty where the help was shown instead
        return said and f"{said} (kibitz --help shows what there is)"
    return None


def _leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""
