"""The commands that back up and restore the database."""

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
    file: Annotated[Path, path_argument("The file to write. An older backup is replaced.")],
) -> None:
    """Copy the database into FILE. Works while kibitz runs."""
    check_writable(file)
    backups.back_up(config.database_url, file)
    console.print(f"backup: {file}; it has no weights of versions, copy {config.data / 'policies'} too", soft_wrap=True)


@command()
def restore(
    config: Config,
    file: Annotated[Path, path_argument("A file that `kibitz backup` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace the database that exists.")] = False,
) -> None:
    """Restore the database from FILE. People who were forgotten since the backup stay forgotten."""
    restored = backups.restore(config.database_url, config.data, file, replaces=replace)
    console.print(str(restored), soft_wrap=True)
