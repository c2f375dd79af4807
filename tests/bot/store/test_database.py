"""The database: each outage has a line of its own and loses nothing; what is deleted leaves the files too."""

import asyncio
import contextlib
import logging
import sqlite3
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import answered, migrate, refused, succeeded, until

from bot.errors import DatabaseUnavailable
from bot.store import database as database_module
from bot.store import write_ahead_log
from bot.store.database import Database
from bot.store.forgetting import forget_person, remove_purged_files
from bot.store.outages import find_outage
from bot.store.registry import BASE
from bot.store.tables import messages
from bot.store.versions import Versions
from bot.types import Conversation, Message

SECRET = "xyzzy-4711"


@pytest.fixture
def hasty(monkeypatch) -> None:
    """SQLite does not wait for other programs."""
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program is writing."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def read_from(path: Path) -> Iterator[None]:
    """Another program is reading: an export, a backup, a training run."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM messages").fetchall()
        yield
        other.execute("COMMIT")


def holds_secret(data: Path) -> bool:
    return any(SECRET.encode() in path.read_bytes() for path in data.glob("kibitz.db*"))


async def together(database: Database, *work: tuple) -> list:
    """What becomes of calls that wait for the database's thread together, in one batch."""
    gate = threading.Event()
    busy = database.call(gate.wait)
    calls = [database.call(*one) for one in work]
    gate.set()
    _, *done = await asyncio.gather(busy, *calls, return_exceptions=True)
    return done


def test_a_locked_database_is_read_without_its_lock_and_says_so_where_it_must_be_written(
    config, database, registry, hasty, here
):
    path, directory = config.data / "kibitz.db", ("--data-dir", config.data)
    with locked(path):
        succeeded(here("status", *directory))  # the schema is this program's
        done = here("pause-learning", *directory)
        refused(done, "is locked by another program")
        assert "backup" not in done.stderr
    succeeded(here("pause-learning", *directory))  # the control
    migrate(database, "0006")
    with locked(path):
        refused(here("status", *directory), "is locked by another program")
    succeeded(here("status", *directory))


async def test_on_a_full_disk_nobody_is_told_that_it_is_stored_and_later_all_can_be(database, store):
    place = store.open_conversation(Conversation("test", "here"))

    def limit(pages: int) -> None:
        with database.engine.connect().execution_options(read_only=True) as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    said = [Message(place.id, "ann", text) for text in ("one", "two " * 100_000, "three")]
    limit(1)  # no more than there are now
    told = await together(database, *((store.add_message, one) for one in said))
    assert [type(one) for one in told] == [DatabaseUnavailable] * 3
    assert "has no room left on its disk" in str(told[0])
    assert store.read_messages(place.id) == []
    limit(10**6)
    assert await together(database, *((store.add_message, one) for one in said)) == [True] * 3  # the control
    assert store.read_messages(place.id) == said


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("sqlite:////nowhere/kibitz.db", "cannot be read or written (unable to open database file)"),
        ("postgresql+psycopg://kibitz:hunter2@127.0.0.1:1/kibitz", "does not answer"),
    ],
)
def test_a_database_that_is_not_there_says_so_without_its_password(url, wanted):
    with pytest.raises(DatabaseUnavailable) as refused:
        Database(url).upgrade()
    assert wanted in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_database_that_may_not_be_written_says_so(config, database):
    readonly = Database(f"sqlite:///file:{config.data / 'kibitz.db'}?mode=ro&uri=true")
    readonly.upgrade()  # nothing is to be done
    with (
        pytest.raises(DatabaseUnavailable, match="cannot be written; give kibitz permission"),
        readonly.begin() as connection,
    ):
        connection.execute(messages.delete())


async def test_a_server_that_is_gone_for_a_moment_fails_what_was_under_way_and_serves_the_next(postgresql):
    url = postgresql()
    database = Database(url)
    database.upgrade()
    done: list[str] = []

    def write(name: str, is_cut: bool = False) -> None:
        with database.begin() as connection:
            own = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
            connection.execute(sa.text("INSERT INTO switches (name, since) VALUES (:name, now())"), {"name": name})
            database.run_after_commit(lambda: done.append(name))
            if is_cut:
                with other.connect() as admin:
                    admin.execute(sa.text("SELECT pg_terminate_backend(:own)"), {"own": own})
                connection.execute(sa.text("SELECT 1"))

    other = sa.create_engine(url)
    told = await together(database, (write, "one"), (write, "two", True), (write, "three"))
    assert [type(one) for one in told] == [DatabaseUnavailable] * 3
    assert "does not answer" in str(told[0])
    assert await together(database, (write, "four")) == [None]
    with database.read() as connection:
        assert connection.execute(sa.text("SELECT name FROM switches")).scalars().all() == done == ["four"]
    other.dispose()
    database.close()


def test_a_bug_is_no_outage(database):
    with pytest.raises(sa.exc.OperationalError), database.begin() as connection:
        connection.execute(sa.text("SELECT * FROM nothing"))


def test_an_error_of_the_database_does_not_spell_what_people_wrote(store):
    with pytest.raises(Exception, match="FOREIGN KEY") as failed:
        store.add_message(Message("nowhere", "ann", SECRET))
    assert SECRET not in "".join(traceback.format_exception(failed.value))


async def test_work_after_the_commit_that_fails_is_logged_and_nobody_is_told_that_the_commit_failed(database, store, caplog):
    place = store.open_conversation(Conversation("test", "here"))
    done: list[str] = []

    def say(text: str, after) -> bool:
        with database.begin():
            said = store.add_message(Message(place.id, "ann", text))
        database.run_after_commit(after)
        return said

    def fail() -> None:
        raise PermissionError("the files cannot be removed")

    work = [(say, "one", fail), (say, "two", lambda: done.append("two"))]
    assert await together(database, *work) == [True, True]
    assert [one.text for one in store.read_messages(place.id)] == ["one", "two"]
    assert done == ["two"]  # one failure does not stop the rest
    assert "the files cannot be removed" in caplog.text
    database.run_after_commit(fail)  # outside of any transaction


def test_what_cannot_be_removed_is_named_and_stops_nothing_else(database, registry, tmp_path, caplog, monkeypatch):
    versions = [registry.reserve(registry.get(BASE)) for _ in range(2)]
    for version in versions:
        Path(version.path).mkdir(parents=True)
    with database.begin() as connection:
        Versions(connection, registry.directory).purge({version.name for version in versions})
    stuck = versions[0].path

    def refuse(path: str) -> None:
        if path == stuck:
            raise PermissionError(13, "Permission denied")
        Path(path).rmdir()

    monkeypatch.setattr("bot.store.forgetting.shutil.rmtree", refuse)
    remove_purged_files(registry)
    assert [Path(version.path).exists() for version in versions] == [True, False]
    assert f"remove {stuck}" in caplog.text


async def test_a_busy_log_is_emptied_later_in_the_background_and_the_operator_is_told(
    config, database, store, registry, tokenizer, monkeypatch, caplog
):
    monkeypatch.setattr(write_ahead_log, "IDLE_WAIT_SECONDS", 0)
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 10**6)  # who waits for the reader waits for ever
    answered(store, tokenizer, SECRET, "hello", author="ann")
    with read_from(config.data / "kibitz.db"):
        await database.call(forget_person, database, registry, "test", "ann")
        assert holds_secret(config.data)  # the control: the reader keeps it there
        await until(lambda: "still in the log" in caplog.text)
    await until(lambda: "is gone from the log" in caplog.text)
    assert not holds_secret(config.data)


def test_a_log_that_stays_busy_until_the_end_is_told_and_emptied_at_the_next_start(
    config, store, registry, tokenizer, caplog
):
    answered(store, tokenizer, SECRET, "hello", author="ann")
    with read_from(config.data / "kibitz.db"):
        database = Database(config.database_url, config.data)
        forget_person(database, registry, "test", "ann")
        database.close()
        assert "it goes when kibitz starts the next time" in caplog.text
        assert holds_secret(config.data)
    again = Database(config.database_url, config.data)
    again.scrub()
    assert not holds_secret(config.data)
    again.close()


def test_a_log_that_nobody_reads_is_emptied_at_once_and_nothing_is_told(
    config, database, store, registry, tokenizer, caplog
):
    answered(store, tokenizer, SECRET, "hello", author="ann")
    assert holds_secret(config.data)
    forget_person(database, registry, "test", "ann")
    assert not holds_secret(config.data)
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_database_from_the_future_says_what_to_install(config, database, here):
    with database.begin() as connection:
        connection.execute(sa.text("update alembic_version set version_num = '9999'"))
    wanted = "has schema 9999, which this kibitz does not know; install the kibitz that wrote it, or a newer one"
    refused(here("status", "--data-dir", config.data), wanted)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("sqlite://", "keeps nothing when kibitz ends; write sqlite:///FILE"),
        ("sqlite:///:memory:", "keeps nothing when kibitz ends"),
        ("sqlite:///file:x?mode=memory&uri=true", "keeps nothing when kibitz ends"),
        ("mysql://ann:hunter2@here/there", "an unsupported database; write sqlite:///FILE, or postgresql+psycopg://"),
        ("postgresql+nothing://ann:hunter2@here/there", "write sqlite:///FILE, or postgresql+psycopg://"),
        ("postgresql://ann:hunter2@here:port/there", "is not a URL; write sqlite:///FILE, or postgresql+psycopg://"),
    ],
)
def test_a_url_that_names_no_database_that_is_kept_is_refused(tmp_path, here, url, wanted):
    (tmp_path / "config.toml").write_text(f'data_dir = "{tmp_path}"\n[database]\nurl = "{url}"\n')
    done = here("policies", "--config", tmp_path / "config.toml")
    refused(done, wanted)
    assert "hunter2" not in done.stderr


def test_a_disk_without_room_to_begin_reading_is_told_as_full():
    """The code is what SQLite says on a full tmpfs, where its index of the log cannot be made."""
    for code, wanted in ((sqlite3.SQLITE_IOERR_SHMSIZE, "has no room left"), (sqlite3.SQLITE_IOERR_READ, "cannot be read")):
        found = sqlite3.OperationalError("disk I/O error")
        found.sqlite_errorcode = code
        assert wanted in str(find_outage(sa.exc.OperationalError("", {}, found), "sqlite:///x"))
