"""Erasures: who and what was forgotten, in a file beside the database that names nobody.

A backup is older than what was forgotten since; this file is not part of it, so that a restored database can be told. A
person stands in it as a salted hash, a message by its random id. It knows no table.
"""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from filelock import FileLock

from bot.errors import DataError
from bot.types import Person


@dataclass
class NotedErasures:
    """When each person was forgotten last, by digest, and the ids of all messages that were."""

    people: dict[str, datetime] = field(default_factory=dict)
    messages: set[str] = field(default_factory=set)


class Erasures:
    """The file of one data directory. What is added is on disk before the database is told to forget it."""

    def __init__(self, directory: Path):
        self.path = directory / "erasures.txt"
        self._lock = FileLock(directory / "erasures.lock")  # of several processes one makes the salt

    def add_person(self, person: Person, at: datetime) -> None:
        """Note that a person is forgotten."""
        self._add("person", self.digest(person), at)

    def add_message(self, message_id: str, at: datetime) -> None:
        """Note that a message is forgotten."""
        self._add("message", message_id, at)

    def count_bytes(self) -> int:
        """Return how many bytes were noted: it grows whenever anybody is forgotten, in whatever process."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> NotedErasures:
        """Return all that was noted. Raises DataError where the file cannot be read."""
        found = NotedErasures()
        for number, line in enumerate(self._lines()[1:], 2):
            match line.split(" "):
                case ["person", digest, at, "."]:
                    found.people[digest] = self._read_time(at, number)
                case ["message", message_id, _, "."]:
                    found.messages.add(message_id)
        return found  # a line without its end was cut off by a crash, and nothing was forgotten then

    def _read_time(self, text: str, number: int) -> datetime:
        try:
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.path}: line {number} has the date '{text}', which is none; restore the file") from error

    def digest(self, person: Person) -> str:
        """Return what stands for a person in this file."""
        return hashlib.blake2b(json.dumps(person).encode(), key=self._salt, digest_size=16).hexdigest()

    def _add(self, kind: str, what: str, at: datetime) -> None:
        assert self._salt  # stands in the first line
        self._write(f"\n{kind} {what} {at.isoformat()} .")

    @cached_property
    def _salt(self) -> bytes:
        with self._lock:
            if not self.count_bytes():  # an empty one is what a full disk or a crash leaves
                self._write(secrets.token_hex(16), self.path.with_name(self.path.name + ".unfinished"))
        try:
            return bytes.fromhex(self._lines()[0])
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.path}: line 1 is not the salt that kibitz wrote; restore the file") from error

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); restore the file, or let kibitz read it") from error

    def _write(self, text: str, unfinished: Path | None = None) -> None:
        """Add a text, on disk when this returns; what begins the file is written `unfinished` first: whole or not at all."""
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
        try:
            with open(os.open(unfinished or self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if unfinished is not None:
                unfinished.rename(self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); nothing was forgotten yet") from error
