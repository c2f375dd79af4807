"""What an answer comes to where something fails, and what is read of messages that nobody addressed to kibitz."""

import asyncio
import logging

import pytest
from aiolimiter import AsyncLimiter
from test_opinions import answers  # noqa: F401 (a fixture)

from bot.errors import DataError, Forgotten
from bot.types import Message, new_id
from connectors.access import Access
from connectors.answers import SORRY
from connectors.commands import COMMANDS, Asker, Commands


class Screen:
    """What a person sees of one answer."""

    def __init__(self, broken: bool = False):
        self.turn_id, self.told, self.broken = new_id(), [], broken

    async def grow(self, text: str) -> None:
        """Nothing grows here."""

    async def whole(self, text: str) -> None:
        self.told.append(text)

    async def sorry(self, text: str = SORRY) -> None:
        self.told.append(text)
        if self.broken:
            raise ConnectionError("the channel is closed")


def fails(error: Exception):
    async def ask(options):
        raise error

    return ask


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), OSError(28, "No space left on device"), DataError("no")])
async def test_whatever_fails_is_one_apology_and_one_line_with_the_id(answers, caplog, error):  # noqa: F811
    screen = Screen()
    await answers.give(fails(error), screen, AsyncLimiter(9))
    assert screen.told == [SORRY]
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert screen.turn_id in record.getMessage()
    assert len(logging.Formatter().format(record).splitlines()) == 1


async def test_an_apology_that_fails_too_ends_quietly_and_cancelling_still_cancels(answers, caplog):  # noqa: F811
    await answers.give(fails(ZeroDivisionError()), Screen(broken=True), AsyncLimiter(9))
    assert "could not be shown" in caplog.text
    with pytest.raises(asyncio.CancelledError):
        await answers.give(fails(asyncio.CancelledError()), Screen(), AsyncLimiter(9))


async def test_nobody_is_told_about_a_question_that_they_deleted(answers):  # noqa: F811
    screen = Screen()
    await answers.give(fails(Forgotten("gone")), screen, AsyncLimiter(9))
    assert screen.told == []


async def test_a_command_that_fails_says_so(answers, config):  # noqa: F811
    commands = Commands(None, Access(config.access), answers)  # there is no desk: whatever is asked of it fails
    status = next(one for one in COMMANDS if one.name == "status")
    assert await commands.run(status, Asker("ann", "lobby")) == SORRY


async def test_of_what_was_not_said_to_kibitz_only_words_of_the_willing_and_admitted_are_read(answers, database):  # noqa: F811
    answers.users.decide("test", "bob", False)
    said = [Message("", author, f"{author} speaks") for author in ("ann", "bob", "mallory")]
    said.append(Message("", "ann", "  "))
    assert await answers.overheard(said, lambda user: user != "mallory") == said[:1]
    answers.users.decide("test", "bob", True)
    assert await answers.overheard(said, lambda user: True) == said[:3]
