"""Backups: copy the database into one file while kibitz runs, and restore it without what was forgotten since.

SQLite only, because PostgreSQL has its own tools. The weights of versions are not in a backup: they never change, and any
copy of their directory will do.
"""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bot import output_files
from bot.data_directory import lock_directory
from bot.errors import DataError
from bot.store.database import Database
from bot.store.erasures import Erasures
from bot.store.forgetting import forget_again, remove_purged_files
from bot.store.registry import PolicyRegistry
from bot.store.users import record_decision
from bot.wording import count_noun

log = logging.getLogger(__name__)

_COUNT_OUR_TABLES = "SELECT count(*) FROM sqlite_master WHERE name IN ('alembic_version', 'conversations')"


@dataclass(frozen=True)
class RestoreReport:
    """What a restore removed: how many people and messages were forgotten again, and which versions were withdrawn."""

    forgotten: int
    withdrawn: list[str]

    def __str__(self) -> str:
        names = ", ".join(self.withdrawn)
        gone = f"; never to serve again, because the backup or the directory lacks them: {names}" if names else ""
        again = count_noun(self.forgotten, "person or message", "people and messages")
        return f"restored; forgotten again, because they were forgotten since: {again}{gone}"


def back_up(database_url: str, file: Path) -> None:
    """Write the current database into a file, whole or not at all, without blocking anybody.

    Raises DataError if the database is PostgreSQL's or cannot be copied, or if `file` is something else than a backup.
    """
    source = _find_sqlite_file(database_url, f"pg_dump --format=custom --file={file}")
    if not source.is_file():
        raise DataError(f"there is no database {source} to back up; use another --data-dir")
    _refuse_same(source, file)
    if file.is_file() and file.stat().st_size and not _is_backup(file):
        raise DataError(f"{file}: is not a backup of kibitz, so it is not replaced; name another file, or remove it")
    with _replace_database_file(file) as unfinished:
        _copy(source, unfinished)


def restore(database_url: str, data: Path, file: Path, *, replaces: bool = False) -> RestoreReport:
    """Restore the database from a file that `back_up` wrote. An existing database is replaced only with `replaces`.

    People who were forgotten since the backup are forgotten again. Decisions about consent since then are kept, if the
    replaced database can still be read. Versions that the backup does not have, or whose files are gone, never serve again.
    Raises DataError if the file cannot be used or a database exists, ConfigError if kibitz runs.
    """
    instead = f"pg_restore --clean --dbname=DATABASE {file}, and start kibitz: it forgets again"
    target = _find_sqlite_file(database_url, instead)
    _refuse_same(target, file)
    if not file.is_file():
        found = "is a directory" if file.is_dir() else "is not a plain file" if file.exists() else "does not exist"
        raise DataError(f"{file}: {found}; name a file that `kibitz backup` wrote")
    Erasures(data).read()  # raises DataError before anything is replaced
    with lock_directory(data, "serve"), lock_directory(data, "train"):
        if target.exists() and not replaces:
            raise DataError(f"there is a database already, {target}; add --replace to replace it")
        names = {name for (name,) in _read_rows(target, "SELECT name FROM policies")}
        used = {path.name for path in (data / "policies").glob("policy-*") if path.is_dir()} | names
        decisions = _read_rows(target, "SELECT platform, user_id, consent, at FROM users")
        with _replace_database_file(target) as unfinished:
            _copy(file, unfinished)
            with closing(Database(f"sqlite:///{unfinished}", data)) as database:
                database.upgrade()
                database.rebuild_at_close(log.info)  # the backup may be older than the rebuild after an erasure
                withdrawn = PolicyRegistry(database).reconcile_directory(used)
                _reapply_decisions(unfinished, database, decisions)
                database.scrub()
            _empty_log(target)
        with closing(Database(database_url, data)) as database:
            database.rebuild_at_close(log.info)
            registry = PolicyRegistry(database)
            forgotten = forget_again(database, registry)  # after a crash before this, `kibitz serve` does the same
            remove_purged_files(registry)
    return RestoreReport(forgotten, withdrawn)


def _find_sqlite_file(database_url: str, instead: str) -> Path:
    database = Database(database_url)
    database.close()
    if database.file is None:
        raise DataError(f"the database {database.url} is PostgreSQL, which has its own tools; run {instead}")
    return database.file


def _refuse_same(database: Path, file: Path) -> None:
    if database.resolve() == file.resolve():
        raise DataError(f"{file}: is the database itself; name another file")


@contextmanager
def _replace_database_file(path: Path) -> Iterator[Path]:
    """Yield a file for a database. It replaces `path` at the end, without its log; on an error nothing changes."""
    with output_files.replace(path) as unfinished:
        try:
            yield unfinished
        finally:
            _remove_log(unfinished)


def _copy(source: Path, target: Path) -> None:
    """Copy a database of kibitz, with any schema, into a single file."""
    try:
        with (
            closing(sqlite3.connect(_uri(source, "ro"), uri=True)) as old,
            closing(sqlite3.connect(target)) as new,
        ):
            if old.execute(_COUNT_OUR_TABLES).fetchone() != (2,):
                raise DataError(f"{source}: is not a database of kibitz; name a file that `kibitz backup` wrote")
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # one file, without a log
            found = new.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise DataError(f"{source}: is broken ({' '.join(found.split())}); name another backup")
    except sqlite3.Error as error:
        raise DataError(f"{source}: cannot be copied to {target} ({error}); nothing was changed") from error


def _is_backup(file: Path) -> bool:
    """Return whether a file may be a backup. A database of kibitz that is in use has a log, a backup has none."""
    return _read_rows(file, _COUNT_OUR_TABLES) == [(2,)] and _read_rows(file, "PRAGMA journal_mode") == [("delete",)]


def _read_rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query, or none if the database cannot be read."""
    try:
        with closing(sqlite3.connect(_uri(database, "ro"), uri=True)) as old:
            return old.execute(query).fetchall()
    except sqlite3.Error:
        return []


def _reapply_decisions(file: Path, database: Database, decisions: list[tuple[Any, ...]]) -> None:
    """Record those `decisions` (platform, person, consent, time in SQLite's form) that are newer than the database's."""
    known = {(platform, user): at for platform, user, at in _read_rows(file, "SELECT platform, user_id, at FROM users")}
    with database.begin() as connection:
        for platform, user, consent, at in decisions:
            if known.get((platform, user), "") < at:
                record_decision(connection, (platform, user), consent=bool(consent))


def _empty_log(database: Path) -> None:
    """Checkpoint and remove the log of a database to be replaced. SQLite would apply it to the new database."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(_uri(database, "rw"), uri=True)) as old:
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _remove_log(database)


def _remove_log(database: Path) -> None:
    for suffix in ("-wal", "-shm"):
        database.with_name(database.name + suffix).unlink(missing_ok=True)


def _uri(database: Path, mode: str) -> str:
    return f"file:{quote(str(database.absolute()))}?mode={mode}"
