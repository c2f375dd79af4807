"""The log: its forms, the ids by which one message is followed, what it does not quote, and where the operator reads it."""

import asyncio
import contextlib
import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import shared, until, write_config
from fake_vllm import FakeVllm

from bot import app, logs
from bot.errors import DataError
from bot.logs import working_on
from bot.output import progress_bar
from bot.store.database import Database
from bot.types import FeedbackKind
from connectors.base import Lanes
from connectors.local.platforms import PLATFORMS

SECRET = "zyxquon"
log = logging.getLogger("bot.test")


def rows(lines: io.StringIO) -> list[dict[str, Any]]:
    """What was logged as JSON."""
    return [json.loads(line) for line in lines.getvalue().splitlines()]


def fail(error: Exception) -> None:
    try:
        raise error
    except Exception:
        log.exception("it failed")


@contextlib.asynccontextmanager
async def talking(config, tokenizer) -> AsyncIterator[app.Kibitz]:
    """A kibitz without memory, whose vLLM says that it is well."""
    vllm = FakeVllm(tokenizer, says="I am well.")
    serving = config.serving.model_copy(update={"url": await vllm.start()})
    dialogue = config.dialogue.model_copy(update={"embedder": "none"})
    config = config.model_copy(update={"serving": serving, "dialogue": dialogue})
    async with app.running(config, config.policy.model, lambda text: None) as kibitz:
        yield kibitz
    await vllm.stop()


@pytest.mark.parametrize("name", PLATFORMS)
async def test_one_message_and_the_reaction_to_it_are_followed_from_the_platform_to_the_database(
    config, tokenizer, log_lines, name
):
    lines = log_lines(level="debug", format="json")
    async with talking(config, tokenizer) as kibitz:
        platform = PLATFORMS[name](shared(kibitz))
        await platform.start()
        place = platform.place()
        questions = [await platform.say(place, user, f"how are you, {user}?") for user in ("ann", "bob")]
        await until(lambda: [one.is_whole for one in platform.answers(place)] == [True, True])
        answers = [next(one for one in platform.answers(place) if one.question == question) for question in questions]
        turns = [await platform.find_turn_id(answer) for answer in answers]
        await platform.react("ann", answers[0], True)
        given = await feedback_on(kibitz, turns[0])
        await platform.stop()
    logged = [row for row in rows(lines) if row["logger"] == "bot.chat.dialogue"]
    requests = set()
    for turn_id in turns:
        turn = kibitz_turn(config, turn_id)
        stored = [row for row in logged if f"stored message {turn.message_id} " in row["message"]]
        [answered] = [row for row in logged if row.get("turn") == turn_id and row["message"].startswith("answered")]
        assert turn.policy_version in answered["message"]
        assert f"{len(turn.completion_ids)} tokens in " in answered["message"]
        assert {row["request"] for row in stored} == {answered["request"]}
        requests.add(answered["request"])
    assert len(requests) == 2, "each message has its own id, also where they wait for each other"
    [row] = [row for row in logged if given in row["message"]]
    assert row["turn"] == turns[0]
    assert row["request"]
    assert FeedbackKind.APPROVAL in row["message"]


async def feedback_on(kibitz: app.Kibitz, turn_id: str) -> str:
    """The id of the one act of feedback on a turn, once it is stored."""
    async with asyncio.timeout(300):
        while not (said := (await kibitz.dialogue.explain(turn_id)).feedback):
            await asyncio.sleep(0.05)
    [given] = said
    return given.id


def kibitz_turn(config, turn_id: str):
    from bot.store.conversations import ConversationStore

    database = Database(config.database_url, config.data)
    found = ConversationStore(database).find_turn(turn_id)
    database.close()
    return found


async def test_what_waits_in_a_lane_logs_the_ids_of_its_own_event(log_lines):
    lines = log_lines(format="json")
    lanes, done = Lanes(), asyncio.Event()

    async def work(says: str) -> None:
        with working_on(turn=says):
            log.info(says)
        if says == "second":
            raise DataError("it broke")
        if says == "third":
            done.set()

    for says in ("first", "second", "third"):
        with working_on(request=f"event of {says}"):
            lanes.put("lane", lambda says=says: work(says))
    await asyncio.wait_for(done.wait(), 300)
    await lanes.close(10)
    log.info("outside")
    found = [(row["message"], row.get("request"), row.get("turn")) for row in rows(lines)]
    assert found == [
        ("first", "event of first", "first"),
        ("second", "event of second", "second"),
        ("an event in lane failed", "event of second", None),
        ("third", "event of third", "third"),
        ("outside", None, None),
    ]


async def test_what_the_database_logs_has_the_ids_of_who_asked(log_lines, database):
    lines = log_lines(format="json")

    def later() -> None:
        raise RuntimeError(SECRET)

    def store() -> None:
        log.info("in its thread")
        database.run_after_commit(later)

    with working_on(request="one"):
        await database.call(store)
    await until(lambda: len(rows(lines)) == 2)
    assert [row["request"] for row in rows(lines)] == ["one", "one"]
    assert SECRET not in lines.getvalue()


def test_a_line_of_json_says_when_what_and_where(log_lines):
    lines = log_lines(format="json")
    before = datetime.now(UTC)
    with working_on(request="one", turn="two"):
        log.warning('%s said "no"\nand left', "ann")
    fail(DataError("the file is empty"))
    [first, second] = rows(lines)
    at = datetime.fromisoformat(first.pop("time"))
    assert at.utcoffset() == UTC.utcoffset(None)
    assert abs((at - before).total_seconds()) < 3600
    message = 'ann said "no"\nand left'
    assert first == {"level": "warning", "logger": "bot.test", "request": "one", "turn": "two", "message": message}
    assert "in fail" in second["traceback"]
    assert second["traceback"].endswith("the file is empty"), "our own errors quote nobody"


def test_a_line_of_text_says_the_same(log_lines):
    lines = log_lines()
    with working_on(request="one"):
        log.info("hello")
    assert lines.getvalue().endswith("+00:00 INFO bot.test request=one: hello\n")


def test_the_level_is_that_of_the_config_and_libraries_tell_no_details(log_lines):
    logged = {}
    for level in ("debug", "info", "warning", "error"):
        lines = log_lines(level=level, format="json")
        for name in ("bot.test", "discord.gateway"):
            for said in ("debug", "info", "warning", "error"):
                getattr(logging.getLogger(name), said)("x")
        logged[level] = [(row["logger"], row["level"]) for row in rows(lines)]
    ours = [("bot.test", level) for level in logged]
    theirs = [("discord.gateway", "warning"), ("discord.gateway", "error")]
    assert logged["debug"] == ours + theirs
    assert logged["info"] == ours[1:] + theirs
    assert logged["warning"] == ours[2:] + theirs
    assert logged["error"] == ours[3:] + theirs[1:]


@pytest.mark.parametrize("format", ["text", "json"])
@pytest.mark.parametrize("shows_text", [False, True], ids=["by default", "the control"])
def test_neither_texts_nor_errors_of_libraries_are_quoted_unless_the_config_says_so(log_lines, format, shows_text):
    lines = log_lines(format=format, text=shows_text)
    logs.log_text("message", f"my word is {SECRET}\n" + "x" * 1000)
    assert (SECRET in lines.getvalue()) == shows_text
    assert len(lines.getvalue()) < 500, "only its beginning"
    assert len(lines.getvalue().splitlines()) == shows_text
    fail(ValueError(f"cannot parse my other word, {SECRET[::-1]}"))
    assert (SECRET[::-1] in lines.getvalue()) == shows_text
    assert "ValueError" in lines.getvalue()
    assert "in fail" in lines.getvalue(), "it is told where"


TELL = """
from bot import logs
from bot.config import LogConfig
from bot.output import announce
announce("before")
logs.set_up(LogConfig(format="{format}", level="error"))
announce("50% of [bold] :cat: " + "words " * 40)
logs.OPERATOR.error("it ends")
"""


def told(format: str, stdout: str, stderr: str) -> tuple[str, str]:
    """What a process that tells its operator something writes to standard output and to standard error."""
    terminal, end = pty.openpty()
    pipes = {"terminal": end, "pipe": subprocess.PIPE}
    code = TELL.format(format=format)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=pipes[stdout], stderr=pipes[stderr], text=True)
    os.close(end)
    shown = b""
    if "terminal" in (stdout, stderr):  # it is read while it is written to
        with contextlib.suppress(OSError):  # the child has ended, and all was read
            while part := os.read(terminal, 4096):
                shown += part
    os.close(terminal)
    piped = child.communicate(timeout=300)
    screen = shown.decode().replace("\r\n", "\n")
    assert child.returncode == 0
    if stdout == stderr == "terminal":
        return screen, ""
    return (screen if stdout == "terminal" else piped[0]), (screen if stderr == "terminal" else piped[1])


def test_the_operator_is_told_once_in_what_is_read():
    said = "50% of [bold] :cat: " + "words " * 40
    for place in ("pipe", "terminal"):
        out, errors = told("text", place, place)
        assert out.startswith(f"* before\n* {said}\n"), "in one line, however long"
        assert (out + errors).count("50%") == (out + errors).count("it ends") == 1
        assert (out + errors).endswith("kibitz: it ends\n")
        out, errors = told("json", place, place)
        assert out.startswith("* before\n")
        lines = [json.loads(line) for line in (out + errors).splitlines()[1:]]
        assert [(row["logger"], row["level"], row["message"]) for row in lines] == [
            ("kibitz", "info", said),
            ("kibitz", "error", "it ends"),
        ]


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_log_that_the_terminal_does_not_show_has_what_the_operator_is_told_too(format):
    out, errors = told(format, "terminal", "pipe")
    assert out.count("50%") == errors.count("50%") == 1
    assert (out.count("it ends"), errors.count("it ends")) == (0, 1)
    assert format == "text" or [json.loads(line)["level"] for line in errors.splitlines()] == ["info", "error"]


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_progress_bar_writes_nothing_where_standard_error_is_no_terminal(capsys, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with progress_bar() as report:
        report("reading", 1, 2)
        print("a line", file=sys.stderr)
    assert capsys.readouterr().err == "a line\n"


def test_a_command_logs_as_its_config_says_and_ends_with_a_line_of_the_log(tmp_path, demo_model, here):
    config = write_config(tmp_path, demo_model)
    asked = "why", "--config", config, "nothing"
    done = here(*asked)
    assert (done.returncode, done.stderr.startswith("kibitz: ")) == (2, True), "the control"
    config.write_text(config.read_text() + '[log]\nformat = "json"\n')
    as_json = here(*asked)
    [row] = [json.loads(line) for line in as_json.stderr.splitlines()]
    assert (as_json.returncode, row["level"], row["logger"]) == (2, "error", "kibitz")
    assert done.stderr == f"kibitz: {row['message']}\n"
