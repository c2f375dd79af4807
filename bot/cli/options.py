"""Options: the application, the options that its commands share, and the config that they make."""

import functools
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


def command(
    name: str | None = None, group: typer.Typer = app, *, default_model: str | Literal[False] | None = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command. Its first parameter is the config that --config, --data-dir and --seed make.

    With a `default_model` there is --model too; None leaves the model to the config.
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
    """The config of a command, with its options on top and a data directory that can be written."""
    if config is None and Path("config.toml").exists():
        config = Path("config.toml")
    found = configuration.load(config, data_dir=None if data_dir is None else str(data_dir), seed=seed)
    if model is not None:
        found = choose_model(found, model)
    prepare_directory(found.data)
    environment.ensure_user(found.data)
    return found


def choose_model(config: Config, model: str) -> Config:
    """Return the config with another model."""
    chosen = {"model": environment.expand_home(model)}
    return config.model_copy(update={"policy": config.policy.model_copy(update=chosen)})
