"""The rebuild of SQLite's file: nothing that was deleted stays in unused parts of it, at the least cost."""

import contextlib
import logging
import random
import sqlite3
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import answered, migrate, until

from bot import app
from bot.data_directory import lock_directory
from bot.store import database as database_module
from bot.store import rebuild, write_ahead_log
from bot.store.database import Database
from bot.store.forgetting import forget_message, forget_person
from bot.store.rebuild import DUE, mark_rebuild_due
from bot.store.retention import erase_before
from bot.store.tables import switches
from bot.types import Conversation, Message, now


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """All statements of all databases."""
    seen: list[str] = []

    def note(connection, cursor, statement: str, *_) -> None:
        seen.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    yield seen
    sa.event.remove(sa.Engine, "before_cursor_execute", note)


@pytest.fixture
def hurried(monkeypatch) -> None:
    """A planned rebuild begins at once, and retries follow each other fast."""
    monkeypatch.setattr(rebuild, "DELAY_SECONDS", 0.01)
    monkeypatch.setattr(write_ahead_log, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def all_large(monkeypatch) -> None:
    """Each file is a large one."""
    monkeypatch.setattr(rebuild, "LARGEST_SMALL", 0)


@contextlib.contextmanager
def held(path: Path, begin: str) -> Iterator[None]:
    """Another program has a transaction open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(begin)
        other.execute("SELECT count(*) FROM messages").fetchall()
        yield
        other.execute("COMMIT")


def is_due(database: Database) -> bool:
    with database.read() as connection:
        return connection.execute(sa.select(switches.c.name).where(switches.c.name == DUE)).first() is not None


def say(store, count: int = 1, text: str = "hello") -> list[Message]:
    place = store.open_conversation(Conversation("test", "here"))
    said = [Message(place.id, "ann", text) for _ in range(count)]
    for one in said:
        store.add_message(one)
    return said


def test_copies_of_deleted_rows_that_sqlite_leaves_in_its_pages_go_too(tmp_path):
    """SQLite moves rows between pages and does not overwrite where they were, whatever `secure_delete` says."""
    for seed in range(40):
        file, rng = tmp_path / f"{seed}.db", random.Random(seed)
        database = Database(f"sqlite:///{file}")
        with database.begin() as connection:
            switches.create(connection)
            connection.exec_driver_sql(
                "CREATE TABLE w (scope INT, word TEXT, message TEXT, PRIMARY KEY (scope, word, message))"
            )
            for number in range(1500):
                word = f"zq{number}" if rng.random() < 0.1 else f"{rng.getrandbits(24):x}"
                row = rng.randrange(3), word + "y" * rng.randrange(20), f"{rng.getrandbits(64):x}"
                connection.exec_driver_sql("INSERT INTO w VALUES (?, ?, ?)", row)
        with database.begin() as connection:
            connection.exec_driver_sql("DELETE FROM w WHERE word LIKE 'zq%'")
            mark_rebuild_due(connection)
        database.scrub()
        if b"zq" in file.read_bytes():
            break
        database.close()
    else:
        pytest.fail("the control: an empty log is not enough")
    database.close()
    assert b"zq" not in file.read_bytes()


async def test_while_another_program_reads_the_file_is_rebuilt_once_and_only_the_log_is_tried_again(
    config, database, store, statements, hurried
):
    """Each rebuild writes the whole file into the log, which cannot be emptied meanwhile."""
    [said] = say(store)
    with held(config.data / "kibitz.db", "BEGIN"):
        forget_message(database, said.id)
        await until(lambda: "VACUUM" in statements)
        rebuilt = statements.index("VACUUM")
        await until(lambda: sum("wal_checkpoint" in one for one in statements[rebuilt:]) > 5)
        assert statements.count("VACUUM") == 1
        assert is_due(database)  # a crash now would leave the words in the file
    await until(lambda: not is_due(database))
    assert statements.count("VACUUM") == 1
    [said] = say(store)
    forget_message(database, said.id)
    await until(lambda: statements.count("VACUUM") == 2)  # the control: what is erased later is due again


def test_many_deletions_share_one_rebuild(database, store, statements):
    for said in say(store, 20):
        forget_message(database, said.id)
    assert "VACUUM" not in statements
    database.close()
    assert statements.count("VACUUM") == 1
    assert not is_due(database)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for open files in /proc")
def test_sqlite_writes_its_temporary_files_into_the_directory_of_the_database(tmp_path):
    for name in ("one", "it's two"):  # the setting is one for the whole process
        directory, seen = tmp_path / name, set[Path]()
        directory.mkdir(mode=0o700)
        database = Database(f"sqlite:///{directory / 'kibitz.db'}")

        def look(seen: set[Path] = seen) -> None:
            for one in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):
                    seen.update({one.readlink().parent} if "etilqs" in one.readlink().name else set())

        sa.event.listen(database.engine, "connect", lambda raw, _, look=look: raw.set_progress_handler(look, 10_000))
        with database.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE t (x)")
            connection.exec_driver_sql(
                "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
                "INSERT INTO t SELECT hex(randomblob(300)) FROM n"
            )
            switches.create(connection)
            mark_rebuild_due(connection)
        database.rebuild(print)
        database.close()
        assert seen == {directory}


def test_a_directory_for_temporary_files_that_the_operator_chose_stays(tmp_path, monkeypatch):
    def find_directory(name: str) -> str | None:
        with contextlib.closing(Database(f"sqlite:///{tmp_path / name}")) as database, database.read() as connection:
            return connection.exec_driver_sql("PRAGMA temp_store_directory").scalar_one_or_none()

    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path / "elsewhere"))
    assert find_directory("one.db") != str(tmp_path)
    monkeypatch.delenv("SQLITE_TMPDIR")
    assert find_directory("two.db") == str(tmp_path)  # the control


def test_a_large_file_is_rebuilt_at_the_next_start_and_the_operator_is_told_when_something_is_forgotten(
    config, database, store, registry, statements, all_large, caplog
):
    first, second = say(store, 2)
    for said in (first, second):
        forget_message(database, said.id)
        warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "unused parts of" in warnings[0]
        assert "may still hold what was deleted; kibitz rebuilds the file (0 MB) when it starts the next time" in warnings[0]
    database.close()
    assert "VACUUM" not in statements
    told: list[str] = []
    for _ in range(2):
        with contextlib.closing(Database(config.database_url)) as again:
            app._finish_forgetting(again, registry, told.append)
            assert not is_due(again)
    assert statements.count("VACUUM") == 1
    [line] = told
    assert line.startswith("rebuilding the database (0 MB), because something was forgotten")


def test_a_start_rebuilds_only_if_something_was_erased(config, database, store, registry, statements, monkeypatch):
    def start() -> None:
        with contextlib.closing(Database(config.database_url)) as again:
            app._finish_forgetting(again, registry, print)

    [said] = say(store)
    start()
    assert "VACUUM" not in statements
    monkeypatch.setattr(database, "scrub", lambda: None)  # kibitz is killed between the erasure and the rebuild
    forget_message(database, said.id)
    start()
    assert statements.count("VACUUM") == 1


async def test_a_rebuild_that_cannot_be_made_is_told_once_and_tried_again(
    monkeypatch, config, database, store, statements, hurried, caplog
):
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0)
    [said] = say(store)
    with monkeypatch.context() as patched:
        patched.setattr(database, "scrub", lambda: None)  # the rebuild begins below
        forget_message(database, said.id)
    database.engine.dispose()  # connections that would wait
    with held(config.data / "kibitz.db", "BEGIN IMMEDIATE"):
        database.rebuild(print)
        await until(lambda: statements.count("VACUUM") > 3)
        assert caplog.text.count("cannot be rebuilt (database is locked)") == 1
    await until(lambda: not is_due(database))
    assert "was rebuilt and no longer holds what was deleted" in caplog.text


@pytest.mark.parametrize("how", ["a person", "a message", "age"])
def test_each_erasure_makes_a_rebuild_due(database, store, registry, tokenizer, how):
    turn = answered(store, tokenizer, "hello", "hi", author="ann")
    assert not is_due(database)
    if how == "a person":
        assert forget_person(database, registry, "test", "bob").messages == 0
        assert not is_due(database)  # the control: nothing was erased
        forget_person(database, registry, "test", "ann")
    elif how == "a message":
        forget_message(database, turn.message_id)
    else:
        erase_before(database, now() + timedelta(days=1), 10)
    assert is_due(database)


@pytest.mark.parametrize("serves", [False, True])
def test_the_command_forget_rebuilds_a_large_file_unless_kibitz_serves(
    config, database, store, here, all_large, statements, serves
):
    say(store)
    with lock_directory(config.data, "serve") if serves else contextlib.nullcontext():
        done = here("forget", "test", "ann", "--data-dir", config.data)
    assert done.returncode == 0
    assert ("rebuilding the database" in done.stdout) == (not serves)
    assert ("rebuilds the file (0 MB) when it starts the next time" in done.stderr) == serves
    assert is_due(database) == serves
    assert statements.count("VACUUM") == (not serves)


def test_a_file_in_which_something_was_forgotten_before_is_rebuilt_once(database, store):
    for wanted in (False, True):
        if wanted:
            forget_message(database, say(store)[0].id)
            database.rebuild(print)
            assert not is_due(database)
        migrate(database, "0012")
        migrate(database, "head")
        assert is_due(database) == wanted
    database.rebuild(print)
    assert not is_due(database)


def test_postgresql_is_not_rebuilt(postgresql):
    with contextlib.closing(Database(postgresql())) as database:
        database.upgrade()
        with database.begin() as connection:
            mark_rebuild_due(connection)
        database.scrub()
        database.rebuild(print)
        assert not is_due(database)
