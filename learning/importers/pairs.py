"""Pairs: read prompts with responses for the warm start, from chats or from the Cornell Movie Dialogs."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from bot.errors import DataError
from bot.types import Role
from learning.importers.formats import read_recording


def read_pairs(path: Path) -> Iterator[list[dict[str, str]]]:
    """Yield dialogues that end with a response: from a file of `messages`, or the Cornell corpus's folder."""
    yield from _read_cornell(path) if path.is_dir() else _read_chats(path)


def _read_chats(path: Path) -> Iterator[list[dict[str, str]]]:
    for _, said, _, _ in read_recording(path, "openai").dialogues:
        dialogue = [{"role": message.role.value, "content": message.text} for message in said]
        if len(dialogue) > 1 and dialogue[-1]["role"] == Role.ASSISTANT:
            yield dialogue


def _read_cornell(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Read the corpus as published: movie_lines.txt and movie_conversations.txt, with fields separated by ' +++$+++ '."""

    def fields(name: str) -> Iterator[list[str]]:
        try:
            text = (folder / name).read_text(encoding="iso-8859-1")
        except OSError as error:
            raise DataError(f"{folder}: {name} cannot be read ({error.strerror}); give the corpus's folder") from error
        yield from (line.split(" +++$+++ ") for line in text.split("\n") if line.strip())

    said = {row[0]: row[-1].strip() for row in fields("movie_lines.txt")}
    for row in fields("movie_conversations.txt"):
        ids = [part.strip(" '[]\r") for part in row[-1].split(",")]
        for question, answer in itertools.pairwise(ids):
            if said.get(question) and said.get(answer):
                yield [
                    {"role": "user", "content": said[question]},
                    {"role": "assistant", "content": said[answer]},
                ]
