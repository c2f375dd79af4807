"""The commands that back the database up and put it back."""

from pathlib import Path
from typing import Annotated

import typer

from bot.cli.options import ConfigFile, DataDir, Seed, app, configured, path_argument
from bot.output import check_writable, console
from bot.store import backups


@app.command()
def backup(
    file: Annotated[Path, path_argument("The file to write; an older backup there is replaced.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Copy the database into FILE; also while kibitz runs."""
    found = configured(config, data_dir, seed)
    check_writable(file)
    backups.back_up(found, file)
    console.print(f"backup: {file}; to keep the weights of the versions copy {found.data / 'policies'} too", soft_wrap=True)


@app.command()
def restore(
    file: Annotated[Path, path_argument("A file that `kibitz backup` wrote.")],
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of the database that is there.")] = False,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Take the database from FILE. Who was forgotten since then stays forgotten."""
    console.print(str(backups.restore(configured(config, data_dir, seed), file, replace)), soft_wrap=True)
