"""What an answer comes to where something fails, and what is read of messages that nobody addressed to kibitz."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
from aiolimiter import AsyncLimiter
from fake_vllm import FakeVllm
from test_opinions import answers  # noqa: F401 (a fixture)

from bot import app
from bot.errors import DataError, ForgottenError
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.feedback import not_retracted
from bot.store.forgetting import forget_person
from bot.store.registry import PolicyRegistry
from bot.types import Message, SamplingParams, Turn, new_id
from connectors.access import Access
from connectors.answers import SORRY
from connectors.commands import COMMANDS, Asker, Commands
from connectors.terminal import PLATFORM, WHICH, Terminal


class Screen:
    """What a person sees of one answer."""

    def __init__(self, broken: bool = False):
        self.turn_id, self.grew, self.told, self.broken, self.asks_for_pick = new_id(), [], [], broken, False

    async def show_partial(self, text: str) -> None:
        self.grew.append(text)

    async def show_final(self, text: str) -> None:
        self.told.append(text)

    async def apologize(self, text: str = SORRY) -> None:
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
    await answers.ask_and_show(fails(error), screen, AsyncLimiter(9))
    assert screen.told == [SORRY]
    [record] = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert screen.turn_id in record.getMessage()
    assert len(logging.Formatter().format(record).splitlines()) == 1


async def test_an_apology_that_fails_too_ends_quietly_and_cancelling_still_cancels(answers, caplog):  # noqa: F811
    await answers.ask_and_show(fails(ZeroDivisionError()), Screen(broken=True), AsyncLimiter(9))
    assert "could not be shown" in caplog.text
    with pytest.raises(asyncio.CancelledError):
        await answers.ask_and_show(fails(asyncio.CancelledError()), Screen(), AsyncLimiter(9))


async def test_an_answer_that_comes_as_a_whole_is_shown_once_and_one_that_grows_meanwhile(answers):  # noqa: F811
    """What is chosen from several answers is known when all have ended; there is nothing to edit then."""
    turn = Turn("", "", "", "Hey there!", "ann", "policy-0", None, None, None, "stop", SamplingParams(), 1.0)

    async def ask(options, pieces: list[str], pause: float):
        for piece in pieces:
            options.on_text(piece)
            await asyncio.sleep(pause) if pause else None
        await options.on_turn(whole)
        return whole

    for pieces, pause, wanted in ((["Hey there!"], 0, []), (["Hey", " there!"], 0.05, ["Hey"])):  # the second is the control
        screen = Screen()
        whole = replace(turn, id=screen.turn_id)
        await answers.ask_and_show(partial(ask, pieces=pieces, pause=pause), screen, AsyncLimiter(9))
        assert (screen.grew[:1], screen.told) == (wanted, ["Hey there!"])


async def test_nobody_is_told_about_a_question_that_they_deleted(answers):  # noqa: F811
    screen = Screen()
    await answers.ask_and_show(fails(ForgottenError("gone")), screen, AsyncLimiter(9))
    assert screen.told == []


async def test_a_command_that_fails_says_so(answers, config):  # noqa: F811
    commands = Commands(None, Access(config.access), answers)  # there is no desk: whatever is asked of it fails
    status = next(one for one in COMMANDS if one.name == "status")
    assert await commands.run(status, Asker("ann", "lobby")) == SORRY


async def test_of_what_was_not_said_to_kibitz_only_words_of_the_willing_and_admitted_are_read(answers, database):  # noqa: F811
    answers.users.record_consent("test", "bob", False)
    said = [Message("", author, f"{author} speaks") for author in ("ann", "bob", "mallory")]
    said.append(Message("", "ann", "  "))
    assert await answers.select_overheard(said, lambda user: user != "mallory") == said[:1]
    answers.users.record_consent("test", "bob", True)
    assert await answers.select_overheard(said, lambda user: True) == said[:3]


async def talk_in_the_terminal(config, tokenizer, monkeypatch, lines: Callable[[Terminal], Iterator[str]]) -> None:
    """A whole kibitz whose vLLM says what it is told, and somebody who types `lines`.

    What stands between two lines happens when the first is answered.
    """
    vllm = FakeVllm(tokenizer)
    serving = config.serving.model_copy(update={"url": await vllm.start()})
    dialogue = config.dialogue.model_copy(update={"embedder": "none"})
    config = config.model_copy(update={"serving": serving, "dialogue": dialogue})
    async with app.running(config, config.policy.model, lambda text: None) as kibitz:
        terminal = Terminal(kibitz.dialogue, app.make_desk(kibitz))

        async def read_lines(_: int) -> AsyncIterator[str]:
            for line in lines(terminal):
                yield line

        monkeypatch.setattr("connectors.terminal.read_lines", read_lines)
        terminal.is_interactive = False
        await terminal.run()
    await vllm.stop()


@pytest.mark.parametrize("command", ["/good", "/undo", "/regenerate", "/correct Hi!", "/why"])
async def test_a_chat_in_the_terminal_goes_on_where_what_it_speaks_of_was_forgotten_elsewhere(
    command, config, tokenizer, monkeypatch, capsys
):
    def lines(terminal: Terminal) -> Iterator[str]:
        yield "hello\n"
        database = Database(config.database_url, config.data)  # of `kibitz forget` in another process
        forget_person(database, PolicyRegistry(database), PLATFORM, terminal.user)
        database.close()
        yield f"{command}\n"
        yield "are you there?\n"

    await talk_in_the_terminal(config, tokenizer, monkeypatch, lines)
    first, _, then = capsys.readouterr().out.partition(f"you: {command}\n")
    assert "kibitz: Hey there!\n" in first
    told, _, last = then.partition("you: are you there?\n")
    assert told.removeprefix("kibitz: ").startswith("sorry, that did not work: there is no turn ")
    assert len(told.splitlines()) == 1
    assert last == "kibitz: Hey there!\n"


async def test_privacy_in_the_terminal_takes_on_and_off_in_any_case_and_says_what_it_takes(
    config, tokenizer, monkeypatch, capsys
):
    said = []

    def lines(terminal: Terminal) -> Iterator[str]:
        for choice in ("off", "ON", "perhaps", "", "Status", "OFF", ""):
            yield f"/privacy {choice}\n"
            said.append(capsys.readouterr().out.partition("\n")[2].strip())

    await talk_in_the_terminal(config, tokenizer, monkeypatch, lines)
    refused, allowed = said[0], said[1]
    assert refused != allowed
    assert said[2:] == ["Say one of status, on, off.", allowed, allowed, refused, refused]


async def test_in_the_terminal_people_pick_the_better_answer_and_say_why_one_is_bad(config, tokenizer, monkeypatch, capsys):
    disliked, again = "disapproval (terminal)", "regenerate (regenerate)"
    steps = [  # what is typed, how the reply begins, and what then stands of what was said about each answer
        ("hello", "kibitz: Hey there!", []),
        ("/better this", "sorry, that did not work: there is nothing to pick", []),
        ("/bad t L", "noted (policy-0)\n", [{disliked, "tone", "too long"}]),
        ("/bad tu", "noted (policy-0)\n", [{disliked, "tone", "unsafe"}]),
        ("/bad", "noted (policy-0)\n", [{disliked, "tone", "unsafe"}]),
        ("/bad rude", "noted (policy-0), but not why: say it in letters (l too long, ", [{disliked, "tone", "unsafe"}]),
        ("/undo", "taken back\n", [set()]),
        ("/regenerate", f"kibitz: Hey there!\n{WHICH}\n", [{again}]),
        ("/better", "Say one of earlier, this.", [{again}]),
        ("/better this", "noted (policy-0)\n", [{again, "disapproval (pick)"}, {"approval (pick)"}]),
        ("/better Earlier", "noted (policy-0)\n", [{again, "approval (pick)"}, {"disapproval (pick)"}]),
        ("/undo", "taken back\n", [{again}, set()]),
    ]
    found: list[tuple[str, list[set[str]]]] = []

    def lines(_: Terminal) -> Iterator[str]:
        database = Database(config.database_url, config.data)
        store = ConversationStore(database)
        for typed, *_ in steps:
            yield f"{typed}\n"
            turns = store.find_turns_with_feedback()
            said = [not_retracted(store.read_feedback_on([turn.id])[turn.id]) for turn in turns]
            rows = [{row.text or f"{row.kind} ({row.signal})" for row in given} for given in said]
            found.append((capsys.readouterr().out.removeprefix(f"you: {typed}\n"), rows))
        database.close()

    await talk_in_the_terminal(config, tokenizer, monkeypatch, lines)
    assert len(found) == len(steps)
    for (typed, told, standing), (text, rows) in zip(steps, found, strict=True):
        assert text.startswith(told), typed
        assert rows == standing, typed
