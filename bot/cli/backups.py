"""The commands that back the database up and put it back."""

from pathlib import Path
from typing import Annotated

import typer

from bot.cli.options import command, path_argument
from bot.config import Config
from bot.output import check_writable, console
from bot.store import backups


@command()
def backup(
    config: Config,
    file: Annotated[Path, path_argument("The file to write; an older backup there is replaced.")],
) -> None:
    """Copy the database into FILE; also while kibitz runs."""
    check_writable(file)
    backups.back_up(config, file)
    console.print(f"backup: {file}; to keep the weights of the versions copy {config.data / 'policies'} too", soft_wrap=True)


@command()
def restore(
    config: Config,
    file: Annotated[Path, path_argument("A file that `kibitz backup` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of the database that is there.")] = False,
) -> None:
    """Take the database from FILE. Who was forgotten since then stays forgotten."""
    console.print(str(backups.restore(config, file, replace)), soft_wrap=True)
