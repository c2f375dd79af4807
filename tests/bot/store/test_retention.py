"""Retention: what is too old is gone, what is younger stays, and nobody waits long for it."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from conftest import answered, react, until
from fake_vllm import FakeVllm
from pydantic import ValidationError

from bot import app
from bot.config import PrivacyConfig
from bot.memory.caches import Caches
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.store import retention
from bot.store.erasures import Erasures
from bot.store.forgetting import SAMPLES_FILE, find_people, forget_person
from bot.store.registry import BASE
from bot.store.retention import erase_expired
from bot.store.tables import embeddings, feedback, messages, metadata, run_teachers, sources, turns, words
from bot.store.users import Users
from bot.types import (
    Candidate,
    Conversation,
    Feedback,
    FeedbackKind,
    Message,
    Metrics,
    PolicyState,
    Selection,
    Turn,
    new_id,
    now,
)
from learning.data.explanation import explain
from learning.data.replay_buffer import ReplayBuffer

SECRET = "xyzzy parrots in the attic"
YOUNG = "the young tulips bloom early"


def make_older(database, turn: Turn, days: int) -> None:
    """Make a turn, its two messages and what was said about it so many days old."""
    at = now() - timedelta(days=days)
    with database.begin() as connection:
        for column, ids in (
            (messages.c.id, [turn.message_id, turn.reply_id]),
            (turns.c.id, [turn.id]),
            (feedback.c.turn_id, [turn.id]),
        ):
            connection.execute(column.table.update().where(column.in_(ids)).values(at=at))


def count_rows(database) -> dict[str, int]:
    with database.read() as connection:
        tables = metadata.sorted_tables
        return {one.name: connection.execute(sa.select(sa.func.count()).select_from(one)).scalar_one() for one in tables}


def everything_stored(database) -> str:
    with database.read() as connection:
        return "\n".join(str(row) for table in metadata.sorted_tables for row in connection.execute(sa.select(table)))


async def tell_nobody(ids) -> None:
    pass


@pytest.fixture
def talk(database, store, tokenizer):
    """An old turn and a young one, in one conversation; the young one's policy was shown the old one's messages."""
    place = store.open_conversation(Conversation("test", new_id()))
    old = answered(store, tokenizer, SECRET, f"you said {SECRET}", author="ann", place=place)
    shown = {old.message_id: None, old.reply_id: 0.5}
    candidates = [Candidate(text=f"again: {SECRET}"), Candidate(text="Nice!", chance=0.7, features={"length": 5.0})]
    chosen = Selection(head="head-1", chosen=1, candidates=candidates)
    young = answered(store, tokenizer, YOUNG, "Nice!", author="bob", place=place, shown=shown, selection=chosen)
    react(store, old, approves=True, user="bob")
    store.add_feedback(Feedback(old.id, "ann", FeedbackKind.CORRECTION, text=SECRET))
    react(store, young, approves=True, user="bob")
    Memory(database).store_vectors([(old.message_id, SECRET), (young.message_id, YOUNG)], np.ones((2, 4), np.float32), "m")
    make_older(database, old, days=91)
    make_older(database, young, days=89)
    return old, young


async def test_what_is_too_old_is_erased_and_what_is_younger_stays(
    config, database, store, registry, tokenizer, talk, tmp_path
):
    old, young = talk
    version = registry.reserve(registry.get(BASE))
    [given] = [row for row in store.read_feedback_on([old.id])[old.id] if row.text is None]
    registry.begin_run(version.name, {}, "", [given.id])
    registry.complete(version.name, "", Metrics())
    registry.promote(version.name)
    Path(version.path).mkdir(parents=True)
    (Path(version.path) / SAMPLES_FILE).write_text(SECRET)
    said = store.read_feedback_on([young.id])[young.id]
    assert SECRET in everything_stored(database), "the control"
    told: list[str] = []

    async def tell(ids) -> None:
        told.extend(ids)

    await erase_expired(database, 0, tell)
    assert SECRET in everything_stored(database), "0 is for ever"
    await erase_expired(database, 90, tell)
    assert set(told) == {old.message_id, old.reply_id}
    assert "xyzzy" not in everything_stored(database)
    assert not (Path(version.path) / SAMPLES_FILE).exists()
    if database.dialect == "sqlite":
        assert b"xyzzy" not in b"".join(path.read_bytes() for path in config.data.rglob("kibitz.db*"))
    assert store.find_turn(old.id) is None
    assert store.read_message(old.message_id).is_forgotten, "its place stays, so that its event is still known"
    left = store.find_turn(young.id)
    assert (left.text, left.shown) == (young.text, young.shown)
    assert (left.prompt_ids, left.completion_ids, left.logprobs) == (None, None, None), "they spelt the old text"
    assert (left.is_selected, left.selection.head, left.selection.chosen) == (True, "head-1", 1)
    assert [one.text for one in left.selection.candidates] == ["", ""], "they were made from the old text"
    assert [one.chance for one in left.selection.candidates] == [0.0, 0.7]
    assert store.read_message(young.message_id).text == YOUNG
    assert store.read_feedback_on([young.id])[young.id] == said
    counts = count_rows(database)
    assert (counts["embeddings"], counts["sources"], counts["feedback"]) == (1, 2, 1)
    with database.read() as connection:
        assert set(connection.execute(sa.select(words.c.message_id)).scalars()) == {young.message_id}
        assert set(connection.execute(sa.select(embeddings.c.message_id)).scalars()) == {young.message_id}
        assert set(connection.execute(sa.select(sources.c.turn_id)).scalars()) == {young.id}
        assert set(connection.execute(sa.select(run_teachers.c.user_id)).scalars()) == {"ann", "bob"}
    assert registry.get_live().name == version.name, "as when a message is deleted"
    buffer = ReplayBuffer(store, tokenizer, config)
    [row] = buffer.snapshot().rated
    assert (row.turn_id, row.logprobs) == (young.id, None)
    assert any(YOUNG in line for line in explain(young.id, buffer, registry).lines())
    forget_person(database, registry, "test", "ann")
    assert registry.get(version.name).state == PolicyState.PURGED, "who taught it is still known"


async def test_a_young_answer_that_was_shown_nothing_old_keeps_its_ids(database, store, tokenizer, talk):
    candidates = [Candidate(text="Hey there!"), Candidate(text="Hi")]
    apart = answered(store, tokenizer, "hello", "Hey there!", selection=Selection(candidates=candidates))
    await erase_expired(database, 90, tell_nobody)
    assert store.find_turn(apart.id) == apart


async def test_it_is_done_in_small_transactions_between_which_others_are_served(database, store, monkeypatch):
    monkeypatch.setattr(retention, "BATCH_SIZE", 4)
    place = store.open_conversation(Conversation("test", new_id()))
    old = now() - timedelta(days=100)
    for number in range(22):
        store.add_message(Message(place.id, "ann", f"{SECRET} {number}", at=old))
    done: list[int] = []
    erase = retention.erase_before

    def erase_some(*arguments) -> list[str]:
        found = erase(*arguments)
        done.append(len(found))
        return found

    monkeypatch.setattr(retention, "erase_before", erase_some)
    await erase_expired(database, 90, tell_nobody)
    assert done == [4, 4, 4, 4, 4, 2, 0]
    assert [one.text for one in store.read_messages(place.id)] == [""] * 22
    await erase_expired(database, 90, tell_nobody)
    assert done[7:] == [0], "what is erased is not looked at again"


async def test_who_is_behind_a_young_answer_can_be_forgotten_and_say_no_after_their_words_are_too_old(
    config, database, store, registry, tokenizer, tmp_path
):
    """Ann's words, of which only answers are left, by way of one answer and of two."""
    place = store.open_conversation(Conversation("test", new_id()))
    first = answered(store, tokenizer, SECRET, f"you said {SECRET}", author="ann", place=place)
    second, third = (
        answered(store, tokenizer, YOUNG, f"she told me of {SECRET}", author="bob", place=place, shown={one: 0.9})
        for one in (first.message_id, first.reply_id)
    )
    make_older(database, first, days=91)
    given = [react(store, one, approves=True, user="bob") for one in (second, third)]
    await erase_expired(database, 90, tell_nobody)
    assert [store.find_turn(one.id) is None for one in (first, second, third)] == [True, False, False]
    await erase_expired(database, 90, tell_nobody)
    users, buffer = Users(database, config.privacy), ReplayBuffer(store, tokenizer, config)

    def used() -> list[str]:
        snapshot = buffer.snapshot()
        return sorted(one.turn_id for one in snapshot.training + snapshot.held_out)

    assert used() == sorted([second.id, third.id]), "the control"
    assert ("test", "ann") in find_people(database), "`kibitz forget` knows her by what was made from her words"
    users.record_consent("test", "ann", consent=False)
    assert used() == []
    version = registry.reserve(registry.get(BASE))
    registry.begin_run(version.name, {}, "", [one.id for one in given])
    registry.complete(version.name, "", Metrics())
    erased = forget_person(database, registry, "test", "ann")
    assert (erased.answers, erased.policies) == (2, 1)
    assert SECRET not in everything_stored(database)
    assert store.read_messages(place.id)


async def test_what_is_erased_is_gone_from_memory_too(database, store, talk):
    recall = Recall(Memory(database), None, load_retrieval_weights())
    old, _ = talk
    asked = Message(old.conversation_id, "cleo", "parrots in the attic?")
    assert SECRET in [one.message.text for one in await recall.find(asked, 4)]
    index = recall.read_scope(store.read_conversation(old.conversation_id)).index
    await erase_expired(database, 90, recall.drop)
    assert {one.message.text for one in await recall.find(asked, 4)} == {"Nice!", YOUNG}
    assert recall.read_scope(store.read_conversation(old.conversation_id)).index is not index
    recall.close()


async def test_what_is_erased_is_gone_from_all_caches(config, database, store, tokenizer, talk):
    recall = Recall(Memory(database), None, load_retrieval_weights())
    caches = Caches(Erasures(config.data), recall, tokenizer)
    tokenizer.count_text_tokens(SECRET)
    assert tokenizer.count_text_tokens.cache_info().currsize, "the control"
    await erase_expired(database, 90, caches.drop)
    assert not tokenizer.count_text_tokens.cache_info().currsize
    recall.close()


async def test_a_running_kibitz_erases_what_is_too_old(config, database, store, tokenizer, talk):
    vllm = FakeVllm(tokenizer)
    await vllm.start()
    serving = config.serving.model_copy(update={"url": vllm.url})
    config = config.model_copy(update={"serving": serving, "privacy": PrivacyConfig(retention_days=90)})
    database.close()
    async with app.running(config, config.policy.model, lambda line: None) as kibitz:
        await until(lambda: SECRET not in everything_stored(kibitz.database))
        assert YOUNG in everything_stored(kibitz.database)
    await vllm.stop()


@pytest.mark.parametrize("days", [-1, 10**9])
def test_a_number_of_days_that_makes_no_sense_is_refused(days):
    with pytest.raises(ValidationError):
        PrivacyConfig(retention_days=days)
