"""Erasures: record forgotten people and messages in a file beside the database, without names.

The file is not part of a backup, so that a restored database can forget again what was forgotten since. A person is
recorded as a salted hash, a message by its random id.
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
    """The recorded erasures: when each person was last forgotten, by digest, and the ids of forgotten messages."""

    people: dict[str, datetime] = field(default_factory=dict)
    messages: set[str] = field(default_factory=set)


class Erasures:
    """The file of one data directory. An erasure is on disk before the database forgets."""

    def __init__(self, directory: Path):
        self.path = directory / "erasures.txt"
        self._lock = FileLock(directory / "erasures.lock")  # only one process may make the salt

    def add_person(self, person: Person, at: datetime) -> None:
        """Record that a person is forgotten."""
        self._add("person", self.digest(person), at)

    def add_message(self, message_id: str, at: datetime) -> None:
        """Record that a message is forgotten."""
        self._add("message", message_id, at)

    def count_bytes(self) -> int:
        """Return the size of the file. It grows with every erasure, in whatever process."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> NotedErasures:
        """Return all erasures. Raises DataError if the file cannot be read."""
        found = NotedErasures()
        for number, line in enumerate(self._lines()[1:], 2):
            match line.split(" "):
                case ["person", digest, at, "."]:
                    found.people[digest] = self._read_time(at, number)
                case ["message", message_id, _, "."]:
                    found.messages.add(message_id)
        return found  # a crash cut off a line without its end, before anything was forgotten

    def _read_time(self, text: str, number: int) -> datetime:
        try:
            return datetime.fromisoformat(text).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise DataError(f"{self.path}: line {number} has '{text}', which is not a date; restore the file") from error

    def digest(self, person: Person) -> str:
        """Return the salted hash of a person."""
        return hashlib.blake2b(json.dumps(person).encode(), key=self._salt, digest_size=16).hexdigest()

    def _add(self, kind: str, what: str, at: datetime) -> None:
        assert self._salt  # the first line must be written first
        self._write(f"\n{kind} {what} {at.isoformat()} .")

    @cached_property
    def _salt(self) -> bytes:
        with self._lock:
            if not self.count_bytes():  # a full disk or a crash leaves an empty file
                self._write(secrets.token_hex(16), self.path.with_name(self.path.name + ".unfinished"))
        try:
            return bytes.fromhex(self._lines()[0])
        except (ValueError, IndexError) as error:
            raise DataError(f"{self.path}: line 1 is not the salt that kibitz wrote; restore the file") from error

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); restore the file, or give kibitz permission") from error

    def _write(self, text: str, unfinished: Path | None = None) -> None:
        """Append a text and sync it to disk. The start of the file goes to `unfinished` first: whole or not at all."""
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
