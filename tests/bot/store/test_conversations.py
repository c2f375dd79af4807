"""The store: what is acknowledged is on disk, the same event has one effect, facts are only ever added."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import sqlalchemy as sa
from conftest import answered, migrate, react
from pydantic import ValidationError

from bot.errors import DataError
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.tables import feedback, metadata
from bot.types import Candidate, Conversation, Feedback, FeedbackKind, Message, Role, SamplingParams, Selection, new_id, now


def test_the_migrations_make_the_tables_that_the_code_uses(database):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database.upgrade()  # again: it changes nothing
    with database.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_message_and_a_reaction_of_one_event_are_stored_once(store, tokenizer):
    place = store.open_conversation(Conversation("test", "one"))
    assert store.open_conversation(Conversation("test", "one")) == place
    message = Message(place.id, "ann", "hello", event_id="e1")
    assert store.add_message(message)
    assert not store.add_message(replace(message, id=new_id()))
    turn = answered(store, tokenizer, "hello", "Hey there!")
    given = Feedback(turn.id, "ann", FeedbackKind.APPROVAL, event_id="e2")
    assert store.add_feedback(given)
    assert not store.add_feedback(replace(given, id=new_id()))
    assert store.count_rows()["feedback"] == 1


def test_how_a_turn_was_sampled_is_read_as_it_was_written_also_by_another_version(store, tokenizer):
    written = {"temperature": 0.7, "top_k": 20, "max_tokens": 64, "stop": ["\n"], "mirostat": {"tau": 3}}
    turn = answered(store, tokenizer, "hello", "Hey there!", sampling=SamplingParams.from_json(written))
    with store.database.begin() as connection:
        assert json.loads(connection.exec_driver_sql("SELECT CAST(sampling AS TEXT) FROM turns").scalar_one()) == written
    found = store.find_turn(turn.id)
    assert found == turn
    assert found.sampling.as_json() == written
    assert (found.sampling.top_p, found.sampling.seed, found.sampling.is_truncated) == (1.0, None, True)
    assert answered(store, tokenizer, "hello", "Hey there!").sampling.as_json() == {}, "an imported turn has none"


def test_how_an_answer_was_chosen_is_read_as_it_was_written_and_lost_in_an_older_schema(database, store, tokenizer):
    written = {"head": "head-1", "chosen": 1, "candidates": [{"text": "Hi"}, {"text": "Hey!", "rank": 3}], "new": True}
    turn = answered(store, tokenizer, "hello", "Hey!", selection=Selection.from_json(written))
    plain = answered(store, tokenizer, "hello", "Hey!")
    columns = "SELECT CAST(selection AS TEXT) FROM turns ORDER BY id"
    with database.begin() as connection:
        stored = connection.exec_driver_sql(columns).scalars().all()
    assert json.loads(stored[0]) == written
    assert stored[1] is None
    assert (store.find_turn(turn.id), store.find_turn(plain.id)) == (turn, plain)
    assert (turn.is_selected, plain.is_selected) == (True, False)
    assert store.find_turn(turn.id).selection.as_json() == written, "also by another version"
    migrate(database, "0014")
    migrate(database, "head")
    assert store.find_turn(turn.id) == replace(turn, selection=None)


@pytest.mark.parametrize("odd", [{"chosen": 1}, {"chosen": -1}, {"moved": {"length": float("nan")}}, {"candidates": [{}]}])
def test_a_selection_that_cannot_be_is_refused(odd):
    with pytest.raises(ValidationError):
        Selection.from_json(odd)
    Selection(chosen=1, candidates=[Candidate(text="a"), Candidate(text="b")], moved={"length": 1.0})  # the control


def test_what_is_acknowledged_survives_a_kill(config, store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    script = f"""
import os, signal
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.types import Feedback, FeedbackKind
store = ConversationStore(Database({config.database_url!r}))
for number in range(20):
    store.add_feedback(Feedback({turn.id!r}, str(number), FeedbackKind.APPROVAL))
    print("acknowledged", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert store.count_rows()["feedback"] == done.stdout.count("acknowledged") == 20


async def test_calls_that_wait_together_are_committed_together_and_one_that_fails_harms_no_other(store, database, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    commits = []
    sa.event.listen(database.engine, "commit", commits.append)
    seen = [Feedback(turn.id, str(number), FeedbackKind.APPROVAL, event_id=f"e{number // 2}") for number in range(10)]
    unknown = Feedback("no such turn", "ann", FeedbackKind.APPROVAL)
    waits = [database.call(time.sleep, 0.05)]  # the thread is busy while the others are asked for
    waits += [database.call(store.add_feedback, given) for given in [*seen, unknown]]
    _, *stored, failed = await asyncio.gather(*waits, return_exceptions=True)
    assert stored == [True, False] * 5  # the second of each event sees the first, which is in the same transaction
    assert isinstance(failed, DataError)
    assert len(commits) == 1
    assert {given.user_id for given in store.read_feedback_on([turn.id])[turn.id]} == {"0", "2", "4", "6", "8"}


@pytest.mark.parametrize("beside", [False, True])
async def test_a_call_that_fails_half_way_has_written_nothing(store, database, tokenizer, beside):
    place = store.open_conversation(Conversation("test", "here"))

    def say(*texts: str, fails: bool = False) -> None:
        for text in texts:
            store.add_message(Message(place.id, "ann", text))
        database.run_after_commit(lambda: done.append(texts))
        if fails:
            raise DataError("half way")

    done: list[tuple[str, ...]] = []
    busy = database.call(time.sleep, 0.05)  # the thread is, while the others are asked for
    failing = database.call(lambda: say("one", "two", fails=True))
    others = [database.call(say, "three"), database.call(say, "four")] if beside else []
    _, failed, *_ = await asyncio.gather(busy, failing, *others, return_exceptions=True)
    assert isinstance(failed, DataError)
    said = ["three", "four"] if beside else []
    assert [message.text for message in store.read_messages(place.id)] == said
    assert [text for texts in done for text in texts] == said
    await database.call(say, "five", "six")  # the control
    assert [message.text for message in store.read_messages(place.id)] == [*said, "five", "six"]


async def test_where_the_commit_fails_nobody_is_told_that_it_is_stored(store, database, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")

    def full(connection):
        raise OSError("disk full")

    sa.event.listen(database.engine, "commit", full)
    waits = [database.call(time.sleep, 0.05)]
    waits += [database.call(store.add_feedback, Feedback(turn.id, "ann", FeedbackKind.APPROVAL)) for _ in range(3)]
    done: list[str] = []
    waits += [database.call(database.run_after_commit, lambda: done.append("files of the purged are removed"))]
    _, *told = await asyncio.gather(*waits, return_exceptions=True)
    sa.event.remove(database.engine, "commit", full)
    assert all(isinstance(error, OSError) for error in told)
    assert done == []
    work = [
        (time.sleep, 0.05),
        (store.open_conversation, Conversation("test", "x")),
        (database.run_after_commit, lambda: done.append("removed")),
    ]
    await asyncio.gather(*(database.call(*one) for one in work))  # the control: what is committed is followed by it
    assert done == ["removed"]
    assert store.count_rows()["feedback"] == 0


def test_what_was_not_committed_is_not_there(store, database, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    with pytest.raises(ZeroDivisionError), database.begin() as connection:
        row = Feedback(turn.id, "ann", FeedbackKind.APPROVAL)
        connection.execute(feedback.insert().values(**{name: getattr(row, name) for name in feedback.c.keys()}))  # noqa: SIM118
        raise ZeroDivisionError
    assert store.count_rows()["feedback"] == 0


def test_a_turn_comes_back_as_it_was_recorded(store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there! 👋")
    assert store.find_turn(turn.id) == turn
    assert store.find_answer(turn.message_id) == turn
    assert store.find_last_turn(turn.conversation_id) == turn
    assert store.find_turn("nobody") is None


def test_history_shows_the_answer_that_was_kept_and_the_askers_correction(store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Good day to you.")
    again = replace(turn, id=new_id(), reply_id=new_id(), text="Hey there!", replaces=turn.id)
    store.add_turn(again)
    later = Message(turn.conversation_id, "asker", "thanks")
    store.add_message(later)
    assert [said.text for said in store.read_recent_messages(turn.conversation_id, later, 10)] == ["hello", "Hey there!"]
    store.add_feedback(Feedback(again.id, "stranger", FeedbackKind.CORRECTION, text="Buy now!"))
    assert store.read_recent_messages(turn.conversation_id, later, 10)[-1].text == "Hey there!"
    store.add_feedback(Feedback(again.id, "asker", FeedbackKind.CORRECTION, text="Hi!"))
    said = store.read_recent_messages(turn.conversation_id, later, 10)
    assert [(one.role, one.text) for one in said] == [(Role.USER, "hello"), (Role.ASSISTANT, "Hi!")]
    store.add_feedback(Feedback(again.id, "asker", FeedbackKind.CORRECTION, retracts=True))
    assert store.read_recent_messages(turn.conversation_id, later, 10)[-1].text == "Hey there!"


def test_feedback_is_counted_for_the_next_run_and_ranks_are_not(store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    react(store, turn, approves=True)
    store.add_feedback(Feedback(turn.id, "ann", FeedbackKind.RANK, value=0.0))
    assert store.count_reactions() == 1
    assert store.count_reactions(until=turn.at) == 0
    assert store.count_reactions(since=turn.at) == store.count_reactions(until=now()) == 1


def test_a_database_with_something_in_it_is_brought_back_and_forth(database, store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    given = react(store, turn, approves=True)
    for revision in ("0001", "head"):
        migrate(database, revision)
    assert store.find_turn(turn.id) == turn
    assert store.find_feedback(given.id) == given


def test_a_database_from_the_future_is_refused(config, database):
    with database.begin() as connection:
        connection.execute(sa.text("update alembic_version set version_num = '9999'"))
    with pytest.raises(DataError, match="9999"):
        Database(config.database_url, config.data).upgrade()


def test_a_broken_database_file_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "kibitz.db"
    path.write_bytes(b"this is not a database, but it is long enough to look like one to nobody" * 20)
    before = path.read_bytes()
    with pytest.raises(DataError, match="cannot be opened"):
        Database(f"sqlite:///{path}").upgrade()
    assert path.read_bytes() == before


def test_two_stores_on_one_file_do_not_lose_each_others_writes(config, store, tokenizer):
    other = ConversationStore(Database(config.database_url, config.data))
    turn = answered(store, tokenizer, "hello", "Hey there!")
    for number in range(10):
        (store if number % 2 else other).add_feedback(Feedback(turn.id, str(number), FeedbackKind.APPROVAL))
    assert len(store.read_feedback_on([turn.id])[turn.id]) == 10
