"""Backups: the database in one file, copied while kibitz runs, and put back without what was forgotten since.

SQLite only: PostgreSQL has its own tools. The weights of versions lie beside the database and never change; they are copied
by whatever copies directories. It knows no server.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bot.config import Config
from bot.data_directory import held
from bot.database import Database
from bot.errors import DataError
from bot.forgetting import forget_again, remove_purged
from bot.registry import PolicyRegistry
from bot.users import decide


@dataclass(frozen=True)
class Restored:
    """What a restored database is without."""

    forgotten: int
    withdrawn: list[str]

    def __str__(self) -> str:
        gone = f"; {', '.join(self.withdrawn)} never serve again" if self.withdrawn else ""
        return f"restored; {self.forgotten} people and messages that were forgotten since are forgotten again{gone}"


def back_up(config: Config, file: Path) -> None:
    """Write the database as it is at this moment into a file, whole or not at all. Nobody waits for it."""
    source = _sqlite_file(config, f"pg_dump --format=custom --file={file}")
    if not source.is_file():
        raise DataError(f"there is no database {source} to back up")
    _refuse_same(source, file)
    with _whole(file) as unfinished:
        _copy(source, unfinished)


def restore(config: Config, file: Path, replaces: bool = False) -> Restored:
    """Take the database from a file that `back_up` wrote, in the place of the one that is there if it `replaces` it.

    Who was forgotten since is forgotten again, and what people decided about their consent since stays decided, as far as
    the database that is replaced can still be read. Versions that the backup does not know, or whose files are gone, never
    serve again.
    """
    target = _sqlite_file(config, f"pg_restore --clean --dbname=DATABASE {file}, and start kibitz: it forgets again")
    policies = config.data / "policies"
    _refuse_same(target, file)
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; name one that `kibitz backup` wrote")
    with held(config.data, "serve"), held(config.data, "train"):
        if target.exists() and not replaces:
            raise DataError(f"there is a database already, {target}; add --replace to put the backup in its place")
        names = {name for (name,) in _read(target, "SELECT name FROM policies")}
        used = {path.name for path in policies.glob("policy-*") if path.is_dir()} | names
        decisions = _read(target, "SELECT platform, user_id, consent, at FROM users")
        with _whole(target) as unfinished:
            _copy(file, unfinished)
            with closing(Database(f"sqlite:///{unfinished}", config.data)) as database:
                database.upgrade()
                withdrawn = PolicyRegistry(database).settle_in(policies, used)
                _decide_again(unfinished, database, decisions)
                database.scrub()
            _empty_log(target)
        with closing(Database(config.database_url, config.data)) as database:
            registry = PolicyRegistry(database)
            forgotten = forget_again(database, registry)  # a crash before this: `kibitz serve` begins with the same
            remove_purged(registry)
    return Restored(forgotten, withdrawn)


def _sqlite_file(config: Config, instead: str) -> Path:
    database = Database(config.database_url)
    database.close()
    if database.file is None:
        raise DataError(f"the database {database.url} is PostgreSQL's, which has its own tools; run {instead}")
    return database.file


def _refuse_same(database: Path, file: Path) -> None:
    if database.resolve() == file.resolve():
        raise DataError(f"{file}: is the database itself; name another file")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file that only its owner may read, to be written; it takes the place of `path` at the end, or nothing changes."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from error
    finally:
        _remove_log(unfinished)
        unfinished.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a database of ours, of any version, into a single file."""
    try:
        with (
            closing(sqlite3.connect(_uri(source, "ro"), uri=True)) as old,
            closing(sqlite3.connect(target)) as new,
        ):
            if old.execute("SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'").fetchone() == (0,):
                raise DataError(f"{source}: is no database of kibitz; name a file that `kibitz backup` wrote")
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # one file, without a log
            found = new.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise DataError(f"{source}: is broken ({' '.join(found.split())}); name another backup")
    except sqlite3.Error as error:
        raise DataError(f"{source}: cannot be copied to {target} ({error}); nothing was changed") from error


def _read(database: Path, query: str) -> list[tuple[Any, ...]]:
    """The rows of a query, as far as a database can still be read."""
    try:
        with closing(sqlite3.connect(_uri(database, "ro"), uri=True)) as old:
            return old.execute(query).fetchall()
    except sqlite3.Error:
        return []


def _decide_again(file: Path, database: Database, decisions: list[tuple[Any, ...]]) -> None:
    """Write people's decisions (platform, person, consent, when in SQLite's form) that are newer than the database's own."""
    known = {(platform, user): at for platform, user, at in _read(file, "SELECT platform, user_id, at FROM users")}
    with database.begin() as connection:
        for platform, user, consent, at in decisions:
            if known.get((platform, user), "") < at:
                decide(connection, (platform, user), consent=bool(consent))


def _empty_log(database: Path) -> None:
    """Write the log of a database that is to be replaced into it, and remove it: SQLite would read it into the new one."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(_uri(database, "rw"), uri=True)) as old:
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _remove_log(database)


def _remove_log(database: Path) -> None:
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _uri(database: Path, mode: str) -> str:
    return f"file:{quote(str(database.absolute()))}?mode={mode}"
