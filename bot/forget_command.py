"""The command that forgets a person."""

from typing import Annotated

import typer

from bot.cli import ConfigFile, DataDir, Seed, app, configured
from bot.errors import DataError
from bot.forgetting import find_people, forget_person
from bot.output import console
from bot.stores import open_stores
from bot.types import Person

ID_FORMS = {  # what people's ids look like on each platform of kibitz's own
    "discord": "numbers, such as 80351110224678912",
    "slack": "member ids, such as U012AB3CD",
    "web": "TOKEN-NAME/PERSON, such as local/ann",
    "terminal": "names of this machine's users",
}


@app.command()
def forget(
    platform: Annotated[str, typer.Argument(help="discord, slack, web or terminal.")],
    user: Annotated[str, typer.Argument(help="The platform's id of the person.")],
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Erase what a person wrote and reacted to, and every version that learned from it; also while kibitz runs."""
    database, _, registry = open_stores(configured(config, data_dir, seed))
    check_known((platform, user), find_people(database))
    console.print(f"{forget_person(database, registry, platform, user)}; they teach no more until they consent")
    database.close()


def check_known(person: Person, people: set[Person]) -> None:
    """Check that a person is one of the `people` that kibitz knows. Raises DataError that tells what to write instead."""
    platform, user = person
    platforms = sorted({*ID_FORMS, *(one for one, _ in people)})
    if platform not in platforms:
        raise DataError(f"there is no platform '{platform}'; write one of {', '.join(platforms)}")
    if person not in people:
        form = f"; ids there are {ID_FORMS[platform]}" if platform in ID_FORMS else ""
        raise DataError(f"nobody on {platform} has the id '{user}', and nothing was forgotten{form}")
