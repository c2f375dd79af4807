"""Backups: whole, made while kibitz runs, and put back without what was forgotten since."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from conftest import answered, react, refused, succeeded

from bot.data_directory import lock_directory
from bot.errors import DatabaseUnavailable, DataError
from bot.store.backups import back_up, restore
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.erasures import Erasures
from bot.store.forgetting import forget_again, forget_message, forget_person
from bot.store.registry import BASE, PolicyRegistry
from bot.store.users import Users
from bot.types import Metrics, PolicyState, now

SECRET = "xyzzy-4711"


def taught(registry, data: Path, feedback_id: str) -> str:
    """A live version with files of its own that a run on this feedback made."""
    version = registry.reserve(registry.get(BASE))
    registry.begin_run(version.name, {}, "", [feedback_id])
    Path(version.path).mkdir(parents=True)
    (Path(version.path) / "manifest.json").write_text("{}")
    registry.complete(version.name, "", Metrics())
    registry.promote(version.name)
    return version.name


@pytest.fixture
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elsewhere") / "kibitz.backup"


def test_what_is_restored_is_what_was_backed_up(config, store, registry, tokenizer, file):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    given = react(store, turn, True)
    version = taught(registry, config.data, given.id)
    back_up(config.database_url, file)
    assert file.stat().st_mode & 0o077 == 0  # nobody else may read it
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    answered(store, tokenizer, "good night", "Sleep well!")
    restored = restore(config.database_url, config.data, file, replaces=True)
    assert (restored.forgotten, restored.withdrawn) == (0, [])
    database = Database(config.database_url, config.data)
    found = ConversationStore(database)
    assert found.find_turn(turn.id) == turn
    assert found.count_rows()["turns"] == 1
    assert PolicyRegistry(database).get_live().name == version
    database.close()


def test_a_restore_revives_nobody_who_was_forgotten_since_nor_serves_what_they_taught(
    config, database, store, registry, tokenizer, file
):
    anns, bobs = (answered(store, tokenizer, SECRET, "ok", author=name) for name in ("ann", "bob"))
    clean = taught(registry, config.data, react(store, bobs, True, "bob").id)
    theirs = taught(registry, config.data, react(store, anns, True, "ann").id)
    deleted = answered(store, tokenizer, "never mind", "ok", author="bob")
    back_up(config.database_url, file)
    forget_message(database, deleted.message_id)
    forget_person(database, registry, "test", "ann")
    database.close()
    assert "ann" not in (config.data / "erasures.txt").read_text()  # it names nobody
    assert restore(config.database_url, config.data, file, replaces=True).forgotten == 2
    again = Database(config.database_url, config.data)
    store, registry = ConversationStore(again), PolicyRegistry(again)
    assert store.find_turn(anns.id) is store.find_turn(deleted.id) is None
    assert store.find_turn(bobs.id) == bobs  # the control
    assert (store.read_message(anns.message_id).text, store.read_message(deleted.message_id).text) == ("", "")
    assert registry.get(theirs).state == PolicyState.PURGED
    assert registry.get_live().name == clean
    assert not Users(again, config.privacy).has_consent("test", "ann")
    again.close()
    (config.data / "erasures.txt").unlink()
    restore(config.database_url, config.data, file, replaces=True)  # the control: without the list she would be back
    again = Database(config.database_url, config.data)
    assert ConversationStore(again).read_message(anns.message_id).text == SECRET
    again.close()


def test_what_people_decided_after_the_backup_stays_decided(config, database, store, tokenizer, file):
    users, began = Users(database, config.privacy), now()
    for name in ("bob", "dora"):
        answered(store, tokenizer, "hello", "ok", author=name)
    users.record_consent("test", "dora", consent=False)
    back_up(config.database_url, file)
    users.record_consent("test", "bob", consent=False)
    users.record_consent("test", "dora", consent=True)
    answered(store, tokenizer, SECRET, "ok", author="cleo")
    forget_person(database, PolicyRegistry(database), "test", "cleo")
    database.close()
    restore(config.database_url, config.data, file, replaces=True)
    again = Database(config.database_url, config.data)
    users = Users(again, config.privacy)
    assert users.read_decisions() == {("test", "bob"): False, ("test", "dora"): True, ("test", "cleo"): False}
    assert users.find_forgotten_since("test", began) == {"cleo"}
    since = answered(ConversationStore(again), tokenizer, "hello again", "ok", author="cleo")
    assert forget_again(again, PolicyRegistry(again)) == 0, "what she says when she comes back stays"
    assert ConversationStore(again).find_turn(since.id) == since
    back_up(config.database_url, newer := file.with_name("newer"))
    users.record_consent("test", "bob", consent=True)
    again.close()
    restore(config.database_url, config.data, file, replaces=True)
    restore(config.database_url, config.data, newer, replaces=True)
    again = Database(config.database_url, config.data)
    assert Users(again, config.privacy).read_decisions()["test", "bob"], (
        "the newest decision holds, whichever file it stood in"
    )
    again.close()


def test_who_comes_back_keeps_what_they_say_and_decide_where_the_database_knows_nothing_of_them(
    config, database, store, tokenizer, file
):
    """The backup is older than Ann, and the database that knew of her was lost."""
    back_up(config.database_url, file)
    answered(store, tokenizer, SECRET, "ok", author="ann")
    forget_person(database, PolicyRegistry(database), "test", "ann")
    database.close()
    database.file.unlink()
    restore(config.database_url, config.data, file, replaces=True)
    again = Database(config.database_url, config.data)
    store, registry, users = ConversationStore(again), PolicyRegistry(again), Users(again, config.privacy)
    registry.ensure_base("base")
    since = answered(store, tokenizer, "hello again", "ok", author="ann")
    users.record_consent("test", "ann", consent=True)
    version = taught(registry, config.data, react(store, since, True, "ann").id)
    assert forget_again(again, registry) == 1
    assert (store.find_turn(since.id), registry.get_live().name) == (since, version)
    assert users.has_consent("test", "ann")
    assert forget_again(again, registry) == 0
    again.close()


def test_who_is_forgotten_twice_is_forgotten_again_as_of_the_second_time(config, database, store, tokenizer, file):
    registry = PolicyRegistry(database)
    answered(store, tokenizer, "hello", "ok", author="ann")
    forget_person(database, registry, "test", "ann")
    answered(store, tokenizer, SECRET, "ok", author="ann")
    back_up(config.database_url, file)
    forget_person(database, registry, "test", "ann")
    database.close()
    assert restore(config.database_url, config.data, file, replaces=True).forgotten == 1
    again = Database(config.database_url, config.data)
    assert SECRET not in {one.text for row in ConversationStore(again).read_dialogues() for one in row[1]}
    again.close()


def test_what_could_not_be_forgotten_is_at_the_next_start_and_what_was_said_since_stays(
    config, database, store, registry, tokenizer, monkeypatch
):
    answered(store, tokenizer, SECRET, "ok", author="ann")
    monkeypatch.setattr("bot.store.database.BUSY_SECONDS", 0.01)
    with closing(sqlite3.connect(database.file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with closing(Database(config.database_url, config.data)) as hurried, pytest.raises(DatabaseUnavailable):
            forget_person(hurried, registry, "test", "ann")
        other.execute("ROLLBACK")
    since = answered(store, tokenizer, "hello again", "ok", author="ann")
    assert forget_again(database, registry) == 1
    assert store.find_turn(since.id) == since
    assert SECRET not in {one.text for row in store.read_dialogues() for one in row[1]}


def test_a_list_of_who_was_forgotten_that_a_full_disk_left_empty_is_begun_anew(config, database, store, registry, tokenizer):
    answered(store, tokenizer, SECRET, "ok", author="ann")
    (config.data / "erasures.txt").touch()
    assert forget_person(database, registry, "test", "ann").messages == 1
    assert len(Erasures(config.data).read().people) == 1
    assert not list(config.data.glob("*.unfinished"))
    (config.data / "erasures.txt").write_text("not what kibitz wrote")
    with pytest.raises(DataError, match="line 1 is not the salt"):
        forget_person(database, registry, "test", "ann")


def test_who_comes_back_after_being_forgotten_keeps_what_a_later_backup_has(
    config, database, store, registry, tokenizer, file
):
    answered(store, tokenizer, SECRET, "ok", author="ann")
    forget_person(database, registry, "test", "ann")
    since = answered(store, tokenizer, "hello again", "ok", author="ann")
    back_up(config.database_url, file)
    assert restore(config.database_url, config.data, file, replaces=True).forgotten == 0
    assert forget_again(database, registry) == 0
    again = Database(config.database_url, config.data)
    assert ConversationStore(again).find_turn(since.id) == since
    again.close()


def test_a_database_that_was_put_back_by_hand_is_told_at_the_next_start(config, database, store, registry, tokenizer):
    turn = answered(store, tokenizer, SECRET, "ok", author="ann")
    Erasures(config.data).add_person(("test", "ann"), turn.at)  # as the list says after another tool restored an old copy
    assert forget_again(database, registry) == 1
    assert store.find_turn(turn.id) is None
    assert forget_again(database, registry) == 0


def test_names_that_were_used_since_are_never_used_again_and_their_versions_are_gone(
    config, database, store, registry, tokenizer, file
):
    given = react(store, answered(store, tokenizer, "hello", "ok"), True)
    before = taught(registry, config.data, given.id)
    back_up(config.database_url, file)
    since = taught(registry, config.data, given.id)
    failed = registry.reserve(registry.get(BASE)).name  # has no directory
    database.close()
    assert restore(config.database_url, config.data, file, replaces=True).withdrawn == [since, failed]
    again = Database(config.database_url, config.data)
    found = PolicyRegistry(again)
    assert found.get_live().name == before
    assert not Path(found.get(since).path).exists()
    assert found.reserve(found.get_live()).name == "policy-4"
    again.close()


def test_a_version_whose_weights_are_not_there_does_not_serve_in_a_new_data_directory(
    config, database, store, registry, tokenizer, file, tmp_path_factory
):
    given = react(store, answered(store, tokenizer, "hello", "ok"), True)
    first, second = (taught(registry, config.data, given.id) for _ in range(2))
    back_up(config.database_url, file)
    new = config.model_copy(update={"data_dir": str(tmp_path_factory.mktemp("new"))})
    shutil.copytree(config.data / "policies" / first, new.data / "policies" / first)
    assert restore(new.database_url, new.data, file).withdrawn == [second]
    again = Database(new.database_url, new.data)
    live = PolicyRegistry(again).get_live()
    assert (live.name, Path(live.path)) == (first, new.data / "policies" / first)
    assert (config.data / "policies" / second).is_dir()  # nothing outside of the new directory is touched
    again.close()


def test_a_backup_from_before_the_first_start_can_be_restored_after_it(config, database, demo_model, file):
    back_up(config.database_url, file)
    registry = PolicyRegistry(database)
    used = registry.reserve(registry.ensure_base(demo_model)).name
    database.close()
    assert restore(config.database_url, config.data, file, replaces=True).withdrawn == [used]
    again = Database(config.database_url, config.data)
    found = PolicyRegistry(again)
    assert found.ensure_base(demo_model).name == found.get_live().name == BASE
    assert found.reserve(found.get_live()).name == "policy-2"
    again.close()


def test_every_command_can_read_what_a_backup_from_before_the_first_chat_leaves(config, database, demo_model, file, here):
    back_up(config.database_url, file)
    registry = PolicyRegistry(database)
    registry.ensure_base(demo_model)
    Path(registry.reserve(registry.get_live()).path).mkdir(parents=True)
    database.close()
    options = ("--data-dir", config.data)
    restored = here("restore", file, "--replace", *options)
    assert "never to serve again, because the backup or the directory lacks them: policy-1" in restored.stdout
    assert not (config.data / "policies" / "policy-1").exists()
    for command in (("status",), ("policies",), ("prune",), ("why",), ("pause-learning",)):
        succeeded(here(*command, *options))
    for command, wanted in (
        (("export", file.with_name("out")), "this data directory has no conversations yet"),
        (("why", "some-turn"), "this data directory has no conversations yet"),
        (("deploy", "policy-1"), "policy-1 is purged: only a candidate can be deployed"),
        (("deploy", "policy-9"), "there is no policy version 'policy-9'"),
        (("rollback",), "no version is live, of 1 recorded"),
        (("report",), "there is no training run yet"),
        (("report", "policy-9"), "there is no training run yet"),
        (("forget", "web", "ann"), "nobody on web has the id 'ann'"),
    ):
        refused(here(*command, *options), wanted)


def test_a_folder_with_a_name_that_is_not_ours_is_no_version(config, database, registry, file):
    back_up(config.database_url, file)
    for name in ("policy-007", "policy-x", "policy-2.unfinished"):
        (config.data / "policies" / name).mkdir(parents=True)
    database.close()
    assert restore(config.database_url, config.data, file, replaces=True).withdrawn == []


def test_what_cannot_be_restored_is_refused_in_a_line_and_changes_nothing(config, store, tokenizer, file, here):
    answered(store, tokenizer, "hello", "ok")
    directory = ("--data-dir", config.data)
    good, strange, foreign = file, file.with_name("strange"), file.with_name("foreign")
    back_up(config.database_url, good)
    strange.write_text("this is no database " * 200)
    sqlite3.connect(foreign).execute("CREATE TABLE things (id)").connection.close()
    cut = file.with_name("cut")
    cut.write_bytes(good.read_bytes()[:20_000])
    for one, wanted in (
        (file.with_name("nothing"), "does not exist"),
        (file.parent, "is a directory; name a file that `kibitz backup` wrote"),
        (strange, "file is not a database"),
        (foreign, "is not a database of kibitz"),
        (cut, "malformed"),
        (config.data / "kibitz.db", "is the database itself"),
    ):
        refused(here("restore", one, "--replace", *directory), wanted)
    refused(here("restore", good, *directory), "add --replace")
    with lock_directory(config.data, "serve"):
        refused(here("restore", good, "--replace", *directory), "is in use")
    refused(here("backup", config.data / "kibitz.db", *directory), "is the database itself")
    assert store.count_rows()["turns"] == 1
    assert not list(config.data.glob("*.unfinished*"))
    succeeded(here("backup", good, *directory))  # the control
    succeeded(here("restore", good, "--replace", *directory))


def test_of_postgresql_its_own_tools_are_named(config, file):
    url = "postgresql+psycopg://kibitz:hunter2@127.0.0.1:1/kibitz"
    other = config.model_copy(update={"database": config.database.model_copy(update={"url": url})})
    with pytest.raises(DataError, match="run pg_dump") as refused:
        back_up(other.database_url, file)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(DataError, match="run pg_restore"):
        restore(other.database_url, other.data, file)


def test_a_line_that_a_crash_cut_off_is_passed_by_and_a_lost_salt_is_told(tmp_path):
    noted = Erasures(tmp_path)
    noted.add_message("m1", now())
    with noted.path.open("a") as file:
        file.write("\nperson 0123 2026-11-2")
    noted.add_person(("test", "ann"), now())
    found = Erasures(tmp_path).read()
    assert found.messages == {"m1"}
    assert list(found.people) == [Erasures(tmp_path).digest(("test", "ann"))]
    assert Erasures(tmp_path).digest(("test", "ann")) != Erasures(tmp_path).digest(("test", "bob"))
    noted.path.write_text("no salt\n")
    with pytest.raises(DataError, match="line 1 is not the salt"):
        Erasures(tmp_path).digest(("test", "ann"))


def test_a_backup_replaces_an_older_backup_and_no_other_file(config, store, tokenizer, file, here):
    answered(store, tokenizer, "hello", "ok")
    directory = ("--data-dir", config.data)
    notes, foreign, other = (file.with_name(name) for name in ("notes.toml", "foreign.db", "kibitz.db"))
    notes.write_text("my only notes")
    sqlite3.connect(foreign).execute("CREATE TABLE alembic_version (version_num)").connection.close()
    in_use = Database(f"sqlite:///{other}")  # of another data directory
    in_use.upgrade()
    before = [one.read_bytes() for one in (notes, foreign, other)]
    for one in (notes, foreign, other):
        refused(here("backup", one, *directory), "is not a backup of kibitz, so it is not replaced")
    assert [one.read_bytes() for one in (notes, foreign, other)] == before
    in_use.close()
    file.touch()  # as `mktemp` leaves it
    for _ in range(2):
        succeeded(here("backup", file, *directory))
    restore(config.database_url, config.data, file, replaces=True)
    assert store.count_rows()["turns"] == 1


def test_a_date_that_is_none_is_told_before_anything_is_restored(config, database, store, registry, tokenizer, file, here):
    back_up(config.database_url, file)
    turn = answered(store, tokenizer, "hello", "ok")
    Erasures(config.data).add_person(("test", "ann"), now())
    noted = config.data / "erasures.txt"
    sound = noted.read_text()
    database.close()
    for odd in ("notadate", "9999-99-99"):
        noted.write_text(f"{sound}\nperson 0123 {odd} .")
        wanted = f"line 3 has '{odd}', which is not a date; restore the file"
        refused(here("restore", file, "--replace", "--data-dir", config.data), wanted)
    again = Database(config.database_url, config.data)
    assert ConversationStore(again).find_turn(turn.id) == turn
    again.close()
    noted.write_text(f"{sound}\nperson 0123 2026-01-01T00:00:00 .")  # the control
    succeeded(here("restore", file, "--replace", "--data-dir", config.data))
