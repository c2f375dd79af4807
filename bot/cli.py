"""The command line: shared options, progress bars, the error boundary, and the commands that need only the bot.

Commands that train, simulate or connect are added by `bot.__main__`; each command is a few lines over a function elsewhere.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bot import config as configuration
from bot import environment, output_files
from bot.config import Config
from bot.conversations import ConversationStore
from bot.data_directory import HEALTH, is_held, prepare
from bot.database import Database
from bot.embeddings import Embedder
from bot.errors import ConfigError, KibitzError, cause_of
from bot.memory import Memory
from bot.recall import Recall, weights
from bot.registry import BASE, PolicyRegistry
from bot.state import LATEST, State, derived
from bot.supervision import failing_lines, read_failing
from bot.types import PolicyState, PolicyVersion

Report = Callable[[str, int, int], None]

INTERRUPTED = 130
BAD_INPUT = 2  # the exit code of every error that the person at the keyboard can put right

app = typer.Typer(
    name="kibitz",
    help="A chatbot that learns from its users' reactions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False)
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


def announce(text: str) -> None:
    """Tell the person at the console what happens."""
    console.print(f"* {text}", markup=False, highlight=False)


def tenths(tell: Callable[[str], None]) -> Report:
    """A report of progress for a log: a line for each tenth."""
    told: dict[str, int] = {}

    def report(stage: str, done: int, total: int) -> None:
        if done * 10 // total > told.get(stage, 0):
            told[stage] = done * 10 // total
            tell(f"{stage}: {done:,} of {total:,}")

    return report


def embedder(config: Config) -> Embedder | None:
    """The embedding model that the config names, kept under the data directory; None for "none"."""
    return None if config.dialogue.embedder == "none" else Embedder(config.dialogue.embedder, config.data)


def recall(config: Config, database: Database) -> Recall:
    """What may be remembered, found as the config says."""
    learned = weights(config.dialogue.retrieval_weights)
    return Recall(Memory(database, config.dialogue.across_channels), embedder(config), learned)


def opened(config: Config) -> tuple[Database, ConversationStore, PolicyRegistry]:
    """The database at this program's schema, with the stores on it."""
    database = Database(config.database_url, config.data)
    database.upgrade()
    return database, ConversationStore(database), PolicyRegistry(database)


def write_json(path: Path | None, name: str, figures: dict[str, Any], setup: dict[str, Any]) -> None:
    """Write `{"name", "figures", "setup"}`, whole or not at all."""
    if path is None:
        return
    output_files.write_text(path, json.dumps({"name": name, "figures": figures, "setup": setup}, indent=1, sort_keys=True))
    console.print(f"figures: {path}")


def print_figures(figures: dict[str, Any]) -> None:
    """Show figures as a table."""
    table = Table("figure", "value")
    for name, value in figures.items():
        if isinstance(value, dict):
            value = "\n".join(f"{count} {reason}" for reason, count in value.items()) or "nothing"
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show rows of text as a table."""
    table = Table(*header)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def check_writable(*paths: Path | None) -> None:
    """Refuse an output file that could not be written, before the work and not after it."""
    for path in paths:
        if path is not None:
            output_files.check_replaceable(path)


@contextmanager
def progress_bar() -> Iterator[Report]:
    """A rich progress bar, fed by (stage, done, total); on something that is no terminal it is silent."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        current = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                current = stage
                progress.reset(task, description=stage, total=total)
            progress.update(task, completed=done, total=total, description=stage)

        yield report


@contextmanager
def interruptible(report: Report) -> Iterator[Report]:
    """A report that ends the work where Ctrl-C was pressed, also if a library lost the exception: many have a bare `except`
    around their imports. For work in the main thread, outside an event loop.
    """
    pressed = False
    before = signal.getsignal(signal.SIGINT)

    def press(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def heard(stage: str, done: int, total: int) -> None:
        if pressed:
            raise KeyboardInterrupt
        report(stage, done, total)

    signal.signal(signal.SIGINT, press)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


@app.command()
def state(
    conversation: Annotated[str, typer.Argument(help="A conversation's id; without one the latest are listed.")] = "",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What a conversation is about, who takes part, what is open, what people said of themselves."""
    found = configured(config, data_dir, seed)
    database, store, _ = opened(found)
    if conversation:
        said = store.messages(store.conversation(conversation).id, LATEST)
        console.print(state_text(derived(said, embedder(found))), markup=False)
    else:
        table = Table("conversation", "platform", "channel", "thread", "messages", "last")
        for one, messages, last in store.latest(20):
            table.add_row(one.id, one.platform, one.channel, one.thread, str(messages), f"{last:%Y-%m-%d %H:%M}")
        console.print(table)
    database.close()


def state_text(found: State) -> str:
    """A conversation's state, for people."""
    lines = (
        [f"topic since {found.topic[0].at:%Y-%m-%d %H:%M}: {_short(found.topic[0].text)}"]
        if found.topic
        else ["nothing was said"]
    )
    lines += [f"takes part: {name} ({count} messages)" for name, count in found.participants.items()]
    lines += [f"open: {message.author_id}: {_short(message.text)}" for message in found.open]
    lines += [f"fact: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.facts]
    lines += [f"once: {fact} ({fact.message.at:%Y-%m-%d})" for fact in found.former_facts]
    return "\n".join(lines)


def _short(text: str) -> str:
    return " ".join(text[:200].split())[:100]


@app.command()
def policies(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """List every policy version."""
    _, _, registry = opened(configured(config, data_dir, seed))
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
    _, _, registry = opened(found)
    taken_back, live = registry.rollback()
    running = "; the running kibitz follows at once" if is_held(found.data, "serve") else ""
    console.print(f"{taken_back.name} was taken back, {live.name} is live{running}")


@app.command("pause-learning")
def pause_learning(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Train no new versions; used again, go on. A running kibitz follows."""
    _, _, registry = opened(configured(config, data_dir, seed))
    console.print(pause_text(registry.pause_learning()))


def pause_text(paused: bool) -> str:
    """What pausing came to."""
    return "learning is paused; the same command again ends that" if paused else "learning goes on"


def privacy_text(consents: bool) -> str:
    """What somebody's consent means."""
    if consents:
        return "kibitz may learn from what you write and how you react (/privacy off ends that, /forget-me erases all)."
    return "kibitz learns nothing from you and reminds nobody of what you wrote (/privacy on changes that)."


@app.command()
def status(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """What is live, what was said, what was learned."""
    found = configured(config, data_dir, seed)
    is_running = is_held(found.data, "serve")
    # First: the database may be what fails.
    lines = failing_lines(read_failing(found.data / HEALTH)) if is_running else []
    console.print("\n".join([f"running: {'yes' if is_running else 'no'}", *lines]), markup=False)
    _, store, registry = opened(found)
    console.print(status_text(store, registry))


def status_text(store: ConversationStore, registry: PolicyRegistry) -> str:
    """The lines of `kibitz status` and of `/status`."""
    counts = store.counts()
    versions = registry.all()
    live = next((version.name for version in versions if version.state == PolicyState.LIVE), f"{BASE} (not started yet)")
    lines = [
        f"live: {live}",
        f"versions: {max(len(versions), 1)}",
        ", ".join(f"{name}: {count}" for name, count in counts.items()),
    ]
    lines += [waiting_text(version, store) for version in registry.waiting()]
    if registry.learning_is_paused():
        lines.append("learning: paused")
    runs = registry.runs()
    if runs:
        last = runs[-1]
        lines.append(f"last run: {last['policy']}, taught by {last['n']} reactions: {last['outcome']}")
    return "\n".join(lines)


def waiting_text(version: PolicyVersion, store: ConversationStore) -> str:
    """What a version waits for."""
    more = max(1, version.waits_for - store.reactions(version.drawn_at))
    return f"{version.name} waits for about {more} more reaction{'s' * (more > 1)} to be judged on"


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
