"""The chat in the terminal: the lines that it reads, and how signals end it, whatever its input and output are."""

import asyncio
import contextlib
import os
import pty
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from conftest import ROOT, until, write_config
from fake_vllm import FakeVllm

from bot.errors import DataError
from connectors.terminal import READ_SIZE, read_lines


@pytest.fixture
def pipe():
    """Yield both ends of a pipe, unbuffered. The writing end may be closed by the test."""
    reading, writing = os.pipe()
    with open(reading, "rb", 0) as source, open(writing, "wb", 0) as sink:
        yield source, sink


async def read_all(descriptor: int) -> list[str]:
    return [line async for line in read_lines(descriptor)]


@pytest.mark.parametrize("said", ["", "hello", "hello\n", "hello\n\n👋 where the reads part\nlast", "a\r\nb\r\n"])
async def test_the_lines_of_a_file_and_of_a_pipe_are_those_that_were_written(tmp_path, pipe, said):
    lines = said.removesuffix("\n").split("\n") if said else []
    (tmp_path / "file").write_bytes(said.encode())
    with (tmp_path / "file").open() as file:
        assert await read_all(file.fileno()) == lines
    source, sink = pipe
    reading = asyncio.create_task(read_all(source.fileno()))
    for byte in said.encode():  # characters come in parts
        sink.write(bytes([byte]))
        await asyncio.sleep(0)
    sink.close()
    assert await reading == lines


async def test_a_character_that_lies_across_two_reads_is_whole_and_other_bytes_do_not_end_the_chat(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * (READ_SIZE - 1) + "👋\n".encode() + b"a\xffb\nend")
    with (tmp_path / "file").open() as file:
        assert await read_all(file.fileno()) == ["x" * (READ_SIZE - 1) + "👋", "a\ufffdb", "end"]


async def test_an_input_without_lines_ends_and_one_that_cannot_be_read_is_refused(tmp_path):
    with open("/dev/null") as nothing:
        assert await read_all(nothing.fileno()) == []
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(DataError, match=r"the input cannot be read \(Is a directory\)"):
        await read_all(directory)
    os.close(directory)


async def test_a_read_that_is_given_up_does_not_hold_back_the_event_loop(pipe):
    source, sink = pipe
    reading = asyncio.create_task(read_all(source.fileno()))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    sink.close()


def open_pipe() -> tuple[int, int]:
    return os.pipe()


def open_terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    return theirs, ours


@contextlib.asynccontextmanager
async def chatting(vllm: FakeVllm, tmp_path: Path, model: str, stdin: int, stdout: int) -> AsyncIterator[Process]:
    """Start `kibitz chat`, and kill it at the end if it still runs."""
    extra = f'[serving]\nurl = "{vllm.url}"\n[dialogue]\nembedder = "none"\n[learning]\nenabled = false\n'
    config = write_config(tmp_path, model)
    config.write_text(config.read_text() + extra)
    chat = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bot", "chat", "--config", str(config)),
        stdin=stdin,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    try:
        yield chat
    finally:
        with contextlib.suppress(ProcessLookupError):
            chat.kill()


async def is_interrupted(chat: Process) -> bool:
    """Wait until a chat ends. Tell whether it said that it was interrupted, and printed no traceback."""
    assert chat.stderr is not None
    async with asyncio.timeout(300):
        told = (await chat.stderr.read()).decode()
        return await chat.wait() == 2 and "kibitz: interrupted" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("open_input", "sign"),
    [
        (open_pipe, signal.SIGINT),
        (open_terminal, signal.SIGTERM),
        pytest.param(open_pipe, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(open_terminal, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
async def test_a_signal_ends_a_chat_that_waits_for_a_line(
    vllm, tmp_path: Path, demo_model, open_input: Callable[[], tuple[int, int]], sign: int
):
    """Its output is a pipe, as in `kibitz chat | tee log`."""
    theirs, ours = open_input()
    with open(theirs, "rb", 0) as stdin, open(ours, "wb", 0) as typed:
        async with chatting(vllm, tmp_path, demo_model, stdin.fileno(), asyncio.subprocess.PIPE) as chat:
            typed.write(b"hello\n")
            assert chat.stdout is not None
            async with asyncio.timeout(300):
                assert await chat.stdout.readline() == b"you: hello\n"
                assert await chat.stdout.readline() == b"kibitz: Hey there!\n"
            chat.send_signal(sign)
            assert await is_interrupted(chat)


@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
async def test_a_signal_ends_a_chat_on_a_terminal_in_the_middle_of_an_answer(vllm, tmp_path: Path, demo_model, sign: int):
    vllm.goes_on.clear()
    theirs, ours = open_terminal()
    loop = asyncio.get_running_loop()
    with open(theirs, "rb", 0) as end, open(ours, "r+b", 0) as terminal:
        async with chatting(vllm, tmp_path, demo_model, end.fileno(), end.fileno()) as chat:
            loop.add_reader(terminal, lambda: os.read(terminal.fileno(), READ_SIZE))
            terminal.write(b"hello\r")
            await until(lambda: vllm.asked)
            chat.send_signal(sign)
            assert await is_interrupted(chat)
            loop.remove_reader(terminal)
    vllm.goes_on.set()
