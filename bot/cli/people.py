"""The commands about what people said: what is known, why an answer was given, and what is forgotten."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from bot.chat.texts import describe_state
from bot.cli.options import command, path_argument
from bot.config import Config
from bot.errors import DataError
from bot.memory.embedder import make_embedder
from bot.memory.state import LATEST_MESSAGES, derive_state
from bot.output import check_writable, console
from bot.store.forgetting import find_people, forget_person
from bot.store.registry import PolicyRegistry
from bot.store.stores import open_stores
from bot.types import Person

ID_FORMS = {  # what people's ids look like on each platform of kibitz's own
    "discord": "numbers, such as 80351110224678912",
    "slack": "member ids, such as U012AB3CD",
    "web": "TOKEN-NAME/PERSON, such as local/ann",
    "terminal": "names of this machine's users",
}


@command()
def state(
    config: Config,
    conversation: Annotated[str, typer.Argument(help="A conversation's id; without one the latest are listed.")] = "",
) -> None:
    """What a conversation is about, who takes part, what is open, what people said of themselves."""
    database, store, _ = open_stores(config)
    if conversation:
        said = store.read_messages(store.read_conversation(conversation).id, LATEST_MESSAGES)
        console.print(describe_state(derive_state(said, make_embedder(config))), markup=False)
    else:
        table = Table("conversation", "platform", "channel", "thread", "messages", "last")
        for one, messages, last in store.find_latest_conversations(20):
            table.add_row(one.id, one.platform, one.channel, one.thread, str(messages), f"{last:%Y-%m-%d %H:%M}")
        console.print(table)
    database.close()


@command()
def why(
    config: Config,
    turn: Annotated[str, typer.Argument(help="A turn's id; without one the latest that people spoke of are listed.")] = "",
) -> None:
    """Why an answer is what it is, what people said of it, and which versions learned from that."""
    from bot.models.tokenizer import ChatTokenizer
    from learning.data.explanation import explain
    from learning.data.replay_buffer import ReplayBuffer

    database, store, registry = open_stores(config)
    if turn:
        tokenizer = ChatTokenizer(_find_spoken_model(registry), config.policy.template_args)
        for line in explain(turn, ReplayBuffer(store, tokenizer, config), registry).lines():
            console.print(line, markup=False, highlight=False)
    else:
        table = Table("turn", "version", "answer")
        for one in store.find_turns_with_feedback(newest=20):
            table.add_row(one.id, one.policy_version, Text(" ".join(one.text[:200].split())[:60]))
        console.print(table)
    database.close()


@command()
def export(
    config: Config,
    file: Annotated[Path, path_argument("The file to write; an older one there is replaced.")],
) -> None:
    """Write every conversation that may teach, with its feedback, to FILE, in the form that `kibitz replay` reads."""
    from learning.importers import kibitz_export
    from learning.training.replay import tokenizer_fingerprint

    check_writable(file)
    database, store, registry = open_stores(config)
    written = kibitz_export.export(store, file, tokenizer_fingerprint(_find_spoken_model(registry)), config.privacy)
    database.close()
    console.print(", ".join(f"{name}: {count}" for name, count in written.items()) or "nothing was said yet")


def _find_spoken_model(registry: PolicyRegistry) -> str:
    """The model that people talked with. Raises DataError where nobody talked yet: none is chosen before that."""
    if not registry.find_directories():
        raise DataError("nothing was said yet in this data directory; talk with `kibitz chat`, or name another --data-dir")
    return registry.get_base().base_model


@command()
def forget(
    config: Config,
    platform: Annotated[str, typer.Argument(help="discord, slack, web or terminal.")],
    user: Annotated[str, typer.Argument(help="The platform's id of the person.")],
) -> None:
    """Erase what a person wrote and reacted to, and every version that learned from it; also while kibitz runs."""
    database, _, registry = open_stores(config)
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
