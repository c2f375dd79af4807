"""The commands about people's data: show a conversation's state, explain an answer, export, forget."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from bot.chat.texts import describe_state
from bot.cli.options import command, path_argument
from bot.config import Config
from bot.data_directory import is_locked
from bot.errors import DataError
from bot.memory.embedder import make_embedder
from bot.memory.state import LATEST_MESSAGES, derive_state
from bot.output import announce, check_writable, console
from bot.store.forgetting import find_people, forget_person
from bot.store.registry import PolicyRegistry
from bot.store.stores import open_stores
from bot.types import Person, PolicyState

ID_FORMS = {  # the form of people's ids on each built-in platform
    "discord": "numbers, such as 80351110224678912",
    "slack": "member ids, such as U012AB3CD",
    "web": "TOKEN-NAME/PERSON, such as local/ann",
    "terminal": "names of this machine's users",
}


@command()
def state(
    config: Config,
    conversation: Annotated[str, typer.Argument(help="The id of a conversation. Without it, the latest are listed.")] = "",
) -> None:
    """Show a conversation's topic, participants, open questions, and what people said about themselves."""
    database, store, _ = open_stores(config)
    if conversation:
        said = store.read_messages(store.read_conversation(conversation).id, LATEST_MESSAGES)
        console.print(describe_state(derive_state(said, make_embedder(config.dialogue, config.data))), markup=False)
    else:
        table = Table("conversation", "platform", "channel", "thread", "messages", "last")
        for one, messages, last in store.find_latest_conversations(20):
            table.add_row(one.id, one.platform, one.channel, one.thread, str(messages), f"{last:%Y-%m-%d %H:%M}")
        console.print(table)
    database.close()


@command()
def why(
    config: Config,
    turn: Annotated[str, typer.Argument(help="The id of a turn. Without it, the latest with feedback are listed.")] = "",
) -> None:
    """Explain an answer: what it was made from, its feedback, and the versions that learned from that."""
    from bot.models.tokenizer import ChatTokenizer
    from learning.data.explanation import explain
    from learning.data.replay_buffer import ReplayBuffer

    database, store, registry = open_stores(config)
    if turn:
        tokenizer = ChatTokenizer(_find_spoken_model(config, registry), config.policy.template_args)
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
    file: Annotated[Path, path_argument("The file to write. An existing file is replaced.")],
) -> None:
    """Write the conversations of consenting people, with feedback, to FILE, in the format that `kibitz replay` reads."""
    from learning.importers import kibitz_export
    from learning.training.replay import tokenizer_fingerprint

    check_writable(file)
    database, store, registry = open_stores(config)
    written = kibitz_export.export(store, file, tokenizer_fingerprint(_find_spoken_model(config, registry)), config.privacy)
    database.close()
    console.print(", ".join(f"{name}: {count}" for name, count in written.items()) or "nothing was said yet")


def _find_spoken_model(config: Config, registry: PolicyRegistry) -> str:
    """Return the base model that people talked with, also if it was moved since, for example with the data directory.

    Raises DataError if nobody has talked with kibitz yet, and RegistryError if the model is gone.
    """
    from learning.training.choice import find_base_model

    if not registry.count(PolicyState.LIVE):
        raise DataError("this data directory has no conversations yet; talk with `kibitz chat`, or use another --data-dir")
    model = registry.get_base().base_model
    if Path(model).is_absolute() and not Path(model).is_dir():
        model = find_base_model(config)
        registry.check_base(model)
    return model


@command()
def forget(
    config: Config,
    platform: Annotated[str, typer.Argument(help="discord, slack, web or terminal.")],
    user: Annotated[str, typer.Argument(help="The person's id on the platform.")],
) -> None:
    """Erase a person's messages and feedback, and every version that learned from them. Works while kibitz runs."""
    database, _, registry = open_stores(config)
    check_known((platform, user), find_people(database))
    if not is_locked(config.data, "serve"):
        database.rebuild_at_close(announce)
    console.print(f"{forget_person(database, registry, platform, user)}; they teach no more until they consent")
    database.close()


def check_known(person: Person, people: set[Person]) -> None:
    """Check that a person is one of `people`. Raises DataError that tells what to write instead."""
    platform, user = person
    platforms = sorted({*ID_FORMS, *(one for one, _ in people)})
    if platform not in platforms:
        raise DataError(f"there is no platform '{platform}'; write one of {', '.join(platforms)}")
    if person not in people:
        form = f"; ids there are {ID_FORMS[platform]}" if platform in ID_FORMS else ""
        raise DataError(f"nobody on {platform} has the id '{user}', so nothing was forgotten{form}")
