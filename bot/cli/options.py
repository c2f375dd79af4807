"""The typer application, the options that commands share, and the config that they build."""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bot import config as configuration
from bot import environment, logs, output_files
from bot.config import Config
from bot.data_directory import prepare_directory
from bot.errors import ConfigError

INTERRUPTED = 130
BAD_INPUT = 2  # the exit code of every error that the user can fix

app = typer.Typer(
    name="kibitz",
    help="A chatbot that learns from its users' reactions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(no_args_is_help=True, help="Run a benchmark.")
app.add_typer(bench, name="bench")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"kibitz {importlib.metadata.version('kibitz')}")
        raise typer.Exit


@app.callback()
def _take_common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def path_option(*names: str, help: str, parser: Callable[[str], Path] = environment.read_path) -> Any:
    """Return an option for a path. A leading `~` is expanded here, because the shell leaves it in `--out=~/x`."""
    return typer.Option(*names, help=help, parser=parser, metavar="<path>")


def path_argument(help: str) -> Any:
    """Return an argument for a path, read as `path_option` reads it."""
    return typer.Argument(help=help, parser=environment.read_path)


def _read_plot(text: str) -> Path:
    path = environment.read_path(text)
    output_files.check_replaceable(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"option --plot has value '{text}', which is not a PNG file; use a name that ends in .png")
    return path


ConfigFile = Annotated[Path | None, path_option("--config", help="The config file. Default: ./config.toml, if it exists.")]
DataDir = Annotated[Path | None, path_option("--data-dir", help="The directory that kibitz writes to.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The seed of all random numbers.")]
ModelName = Annotated[str | None, typer.Option("--model", help="toy, builtin, a model directory or a hub name.")]
JsonFile = Annotated[Path | None, path_option("--json", help="Write the figures to this file.")]
PlotFile = Annotated[Path | None, path_option("--plot", help="Plot the result to this PNG file.", parser=_read_plot)]


def command(
    name: str | None = None, group: typer.Typer = app, *, default_model: str | Literal[False] | None = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that registers a command. The command's first parameter is the Config.

    The options --config, --data-dir and --seed are added. With a `default_model` there is --model too; None means that
    the config names the model.
    """
    shared: dict[str, Any] = {"config": ConfigFile, "data_dir": DataDir, "seed": Seed}
    if default_model is not False:
        shared["model"] = ModelName

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(function).parameters.values()

        @functools.wraps(function)
        def run(**options: Any) -> None:
            given = {key: options.pop(key) for key in shared}
            config = make_config(**given)
            logs.set_up(config.log)
            function(config, **options)

        defaults = {"model": default_model}
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=option, default=defaults.get(key))
            for key, option in shared.items()
        ]
        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in (*own, *added)}
        group.command(name)(run)
        return function

    return register


def make_config(config: Path | None, data_dir: Path | None, seed: int | None, model: str | None = None) -> Config:
    """Return the config of a command: the file's values, overridden by options. Create the data directory."""
    if config is None and Path("config.toml").exists():
        config = Path("config.toml")
    found = configuration.load(config, data_dir=None if data_dir is None else str(data_dir), seed=seed)
    if model is not None:
        found = choose_model(found, model)
    prepare_directory(found.data)
    environment.ensure_user(found.data)
    return found


def choose_model(config: Config, model: str) -> Config:
    """Return the config with `model` as the policy's model."""
    chosen = {"model": environment.expand_home(model)}
    return config.model_copy(update={"policy": config.policy.model_copy(update=chosen)})
