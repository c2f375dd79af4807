"""What is forgotten is gone: text, embeddings, feedback, and the policy versions that learned from it (law 10)."""

import asyncio
import shutil
import time
from contextlib import closing
from datetime import timedelta
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from conftest import answered, migrate, react

from bot.config import PrivacyConfig
from bot.errors import DataError, RegistryError
from bot.memory.scope import Memory
from bot.store.database import Database
from bot.store.forgetting import SAMPLES_FILE, forget_message, forget_person
from bot.store.registry import BASE, PolicyRegistry
from bot.store.tables import followups, run_teachers, sources
from bot.store.teachers import find_taught_versions
from bot.store.users import Users
from bot.types import Conversation, Feedback, FeedbackKind, Message, Metrics, PolicyState, SamplingParams, Turn, new_id, now
from learning.data.replay_buffer import ReplayBuffer
from learning.importers.kibitz_export import export

SECRET = "xyzzy-4711"  # what Ann says, and nobody else


def dialogue(store, tokenizer, *said: tuple[str, str], channel: str = "", shown: dict[str, float] | None = None):
    """One conversation: each message with its answer, which was shown all that was said before, and what is `shown`."""
    place = store.open_conversation(Conversation("test", channel=channel or new_id()))
    before: list[str] = []
    turns = []
    for author, text in said:
        seen = dict.fromkeys(before, None) | (shown or {})
        turn = answered(store, tokenizer, text, f"you said {text}", author=author, place=place, shown=seen)
        turns.append(turn)
        before += [turn.message_id, turn.reply_id]
    return turns


def store_turn(store, place: Conversation, asked: Message, **details) -> Turn:
    """A stored answer that repeats the secret."""
    sampled = (1,), (2,), (-0.5,), "stop", SamplingParams(), 1.0
    turn = Turn(place.id, asked.id, new_id(), SECRET, asked.author_id, BASE, *sampled, **details)
    store.add_turn(turn)
    return turn


def everything_on_disk(data: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file())


def taught(registry, tmp_path: Path, feedback: list[str], parent: str = BASE, probe: str = SECRET):
    """A version with files of its own that a run on this feedback made."""
    version = registry.reserve(registry.get(parent))
    registry.begin_run(version.name, {}, "", feedback)
    Path(version.path).mkdir(parents=True)
    (Path(version.path) / "probe.json").write_text(probe)
    registry.complete(version.name, "", Metrics())
    registry.promote(version.name)
    return version


@pytest.mark.parametrize("person", ["ann", "bob"])
def test_with_a_person_the_versions_go_that_learned_from_what_they_said_next(
    database, store, registry, tokenizer, tmp_path, person
):
    [turn] = dialogue(store, tokenizer, ("ann", SECRET))
    after = Message(turn.conversation_id, "ann", "thank you")
    store.add_message(after)
    with database.begin() as connection:
        connection.execute(followups.insert(), {"turn_id": turn.id, "message_id": after.id, "chances": {"approval": 1.0}})
    version = registry.reserve(registry.get(BASE))
    registry.begin_run(version.name, {}, "", [], [after.id])
    registry.complete(version.name, "", Metrics())
    assert find_taught_versions(registry.database, [], [after.id]) == [version.name]
    erased = forget_person(database, registry, "test", person)
    assert erased.policies == (person == "ann")  # the control: Bob said nothing
    assert (registry.get(version.name).state == PolicyState.PURGED) == (person == "ann")


def test_a_forgotten_person_leaves_nothing_anywhere(config, database, store, registry, tokenizer, tmp_path):
    anns, bobs = dialogue(store, tokenizer, ("ann", SECRET), ("bob", "hello"))
    [apart] = dialogue(store, tokenizer, ("bob", "good night"))
    Memory(database).store_vectors([(anns.message_id, SECRET)], np.ones((1, 4), np.float32), "m")
    kept = react(store, apart, True, "bob")
    seen = [react(store, anns, True, "bob"), react(store, bobs, True, "bob"), react(store, apart, False, "ann")]
    store.add_feedback(Feedback(apart.id, "ann", FeedbackKind.COMMENT, text=SECRET))
    clean = taught(registry, tmp_path, [kept.id], probe="")
    (Path(clean.path) / SAMPLES_FILE).write_text(SECRET)  # it was held out there
    first = taught(registry, tmp_path, [seen[0].id], parent=clean.name)
    child = taught(registry, tmp_path, [kept.id], parent=first.name)
    assert SECRET.encode() in everything_on_disk(config.data)  # the control: it was there
    erased = forget_person(database, registry, "test", "ann")
    assert SECRET.encode() not in everything_on_disk(config.data)
    assert (erased.messages, erased.answers, erased.opinions, erased.policies) == (1, 2, 4, 2)
    assert store.find_turn(anns.id) is store.find_turn(bobs.id) is None  # Bob's answer was made from Ann's words
    assert [turn.id for turn in store.find_turns_with_feedback()] == [apart.id]
    assert [row.id for row in store.read_feedback_on([apart.id])[apart.id]] == [kept.id]
    assert [message.text for message in store.read_messages(anns.conversation_id)] == ["", "hello"]
    assert registry.get_live().name == clean.name
    assert [registry.get(one.name).state for one in (first, child)] == [PolicyState.PURGED] * 2
    assert [Path(one.path).exists() for one in (clean, first, child)] == [True, False, False]
    assert (Path(clean.path) / "probe.json").is_file()


@pytest.mark.parametrize("put", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_in_another_place_the_files_go_that_are_there(
    config, database, store, registry, tokenizer, tmp_path, tmp_path_factory, put
):
    [turn], [kept] = (dialogue(store, tokenizer, (person, SECRET)) for person in ("ann", "bob"))
    gone = taught(registry, tmp_path, [react(store, turn, True, "ann").id])
    stays = taught(registry, tmp_path, [react(store, kept, True, "bob").id], probe="")
    for version in (gone, stays):
        (Path(version.path) / SAMPLES_FILE).write_text(SECRET)
    database.close()
    other = config.model_copy(update={"data_dir": str(tmp_path_factory.mktemp("other") / "data")})
    put(config.data, other.data)
    policies = other.data / "policies"
    with closing(Database(other.database_url, other.data)) as again:
        forget_person(again, PolicyRegistry(again), "test", "ann")
    assert [path.name for path in policies.iterdir()] == [stays.name]
    assert not (policies / stays.name / SAMPLES_FILE).exists()
    if put is shutil.copytree:
        assert all((Path(version.path) / SAMPLES_FILE).exists() for version in (gone, stays)), "what was copied stays"


def test_nobody_else_is_touched_and_forgetting_twice_is_forgetting_once(database, store, registry, tokenizer, tmp_path):
    [turn] = dialogue(store, tokenizer, ("bob", "hello"))
    given = react(store, turn, True, "bob")
    version = taught(registry, tmp_path, [given.id])
    for _ in range(2):
        assert forget_person(database, registry, "test", "ann").messages == 0
    forget_person(database, registry, "elsewhere", "bob")  # another platform's bob is another person
    assert store.find_turn(turn.id) == turn
    assert registry.get_live().name == version.name


def test_an_answer_that_was_under_way_while_its_question_was_forgotten_is_not_kept(database, store, registry, tokenizer):
    [anns] = dialogue(store, tokenizer, ("ann", SECRET))
    question = store.read_message(anns.message_id)
    forget_person(database, registry, "test", "ann")
    counted = store.count_rows()
    for shown in ({}, {question.id: None}):
        asked = Message(anns.conversation_id, "bob", "hello")
        store.add_message(asked)
        message_id = question.id if not shown else asked.id
        with pytest.raises(Exception, match="forgotten meanwhile"):
            answered(store, tokenizer, "hello", SECRET, message_id=message_id, shown=shown)
    assert store.count_rows()["turns"] == counted["turns"]


def test_the_event_of_a_forgotten_message_is_still_known(database, store, registry):
    place = store.open_conversation(Conversation("test", "events"))
    store.add_message(Message(place.id, "ann", SECRET, event_id="e1"))
    forget_person(database, registry, "test", "ann")
    assert not store.add_message(Message(place.id, "ann", SECRET, event_id="e1"))  # delivered again, or reconciled
    assert store.find_message_of_event("e1").is_forgotten


def test_a_deleted_message_goes_with_its_answer_and_moves_no_version(database, store, registry, tokenizer, tmp_path):
    first, second = dialogue(store, tokenizer, ("ann", "hello"), ("ann", SECRET))
    given = react(store, second, True, "ann")
    version = taught(registry, tmp_path, [given.id])
    forget_message(database, second.message_id)
    assert store.find_turn(second.id) is None
    assert store.find_turn(first.id) == first
    assert registry.get_live().name == version.name


async def test_what_is_forgotten_amid_other_work_is_gone_from_the_files_too(config, database, store, tokenizer):
    first, second = dialogue(store, tokenizer, ("ann", "hello"), ("ann", SECRET))
    given = [Feedback(first.id, f"user{number}", FeedbackKind.APPROVAL) for number in range(4)]
    work = [database.call(time.sleep, 0.05), *(database.call(store.add_feedback, one) for one in given[:2])]
    work += [database.call(forget_message, database, second.message_id)]  # in one transaction with what is beside it
    await asyncio.gather(*work, *(database.call(store.add_feedback, one) for one in given[2:]))
    assert len(store.read_feedback_on([first.id])[first.id]) == 4
    assert SECRET.encode() not in everything_on_disk(config.data)


def test_a_run_whose_teacher_is_forgotten_meanwhile_leaves_no_version(database, store, registry, tokenizer, tmp_path):
    [turn] = dialogue(store, tokenizer, ("ann", SECRET))
    given = react(store, turn, True, "ann")
    version = registry.reserve(registry.get(BASE))
    registry.begin_run(version.name, {}, "", [given.id])
    forget_person(database, registry, "test", "ann")
    with pytest.raises(Exception, match="purged and cannot become candidate"):
        registry.complete(version.name, "", Metrics())


@pytest.mark.parametrize(
    ("places", "order"),
    [*((3, order) for order in permutations(range(3))), (501, (2, 1, 0))],  # each mention on Discord is a conversation
)
def test_what_was_made_from_forgotten_words_goes_in_whatever_place_and_order_it_was_said(
    database, store, registry, places, order
):
    with database.begin():
        chain = [store.open_conversation(Conversation("test", "channel", "guild", str(number))) for number in range(places)]
    chain = [chain[-1], chain[places // 2], chain[0]]
    times = [now() - timedelta(minutes=5 * one) for one in order]  # clocks of platforms differ, and events come late
    said = Message(chain[0].id, "ann", SECRET)
    store.add_message(said)
    made = [store_turn(store, chain[0], said, at=times[0])]
    for place, at in zip(chain[1:], times[1:], strict=True):
        asked = Message(place.id, "bob", "what did she say?", at=at)
        store.add_message(asked)
        made.append(store_turn(store, place, asked, at=at, shown={made[-1].reply_id: 0.9}))
    other = Message(chain[2].id, "bob", "hello")
    store.add_message(other)
    kept = store_turn(store, chain[2], other)
    erased = forget_person(database, registry, "test", "ann")
    assert (erased.messages, erased.answers) == (1, 3)
    assert [one.id for place in chain for one in store.read_messages(place.id) if SECRET in one.text] == [kept.reply_id]
    assert store.find_turn(kept.id) == kept  # the control: what was not made from her words stays


def test_an_answer_is_not_kept_if_an_answer_that_it_was_shown_was_forgotten_meanwhile(database, store, tokenizer):
    first, second = dialogue(store, tokenizer, ("ann", SECRET), ("bob", "hello"))
    asked = Message(first.conversation_id, "carol", "what did she say?")
    store.add_message(asked)
    forget_message(database, first.message_id)
    with pytest.raises(DataError, match="forgotten meanwhile"):
        store_turn(store, store.read_conversation(asked.conversation_id), asked, shown={second.reply_id: 0.9})
    assert store.find_answer(asked.id) is None
    store_turn(store, store.read_conversation(asked.conversation_id), asked, shown={second.message_id: 0.9})  # the control


@pytest.mark.parametrize("deletes", [True, False])
@pytest.mark.parametrize("how", ["asked", "judged", "followed up", "shown", "shown through an answer"])
def test_what_taught_a_version_outlives_the_message_and_is_forgotten_with_the_person(
    database, store, registry, tokenizer, tmp_path, how, deletes
):
    first, second = dialogue(store, tokenizer, ("ann" if how.startswith("shown") else "bob", SECRET), ("bob", "hello"))
    if how == "shown through an answer":
        [second] = dialogue(store, tokenizer, ("bob", "hi"), shown={first.reply_id: 0.5})
    if how == "asked":
        [second] = dialogue(store, tokenizer, ("ann", "good night"))
    given = react(store, second, True, "ann" if how == "judged" else "bob")
    after = Message(second.conversation_id, "ann", "thank you")
    store.add_message(after)
    with database.begin() as connection:
        connection.execute(followups.insert(), {"turn_id": second.id, "message_id": after.id, "chances": {"approval": 1.0}})
    version = registry.reserve(registry.get(BASE))
    registry.begin_run(version.name, {}, "", [given.id], [after.id] if how == "followed up" else [])
    registry.complete(version.name, "", Metrics())
    registry.promote(version.name)
    if deletes:
        for message in {"followed up": [after.id], "judged": [second.message_id]}.get(
            how, [first.message_id, second.message_id]
        ):
            forget_message(database, message)
    assert registry.get_live().name == version.name  # one deletion moves no version
    assert forget_person(database, registry, "test", "carol").policies == 0  # the control: she taught nothing
    assert forget_person(database, registry, "test", "ann").policies == 1
    assert registry.get(version.name).state == PolicyState.PURGED
    assert registry.get_live().name == BASE
    with database.read() as connection:
        left = connection.execute(sa.select(run_teachers.c.user_id).distinct()).scalars().all()
    assert left == ["bob"]  # nothing says afterwards that she ever taught a version


def test_a_run_does_not_begin_on_what_was_deleted_since_it_was_read(database, store, registry, tokenizer, tmp_path):
    [turn] = dialogue(store, tokenizer, ("ann", SECRET))
    given = react(store, turn, True, "bob")
    version = registry.reserve(registry.get(BASE))
    forget_message(database, turn.message_id)
    with pytest.raises(RegistryError, match="deleted meanwhile"):
        registry.begin_run(version.name, {}, "", [given.id])
    assert registry.list_runs() == []


def test_after_one_person_is_forgotten_the_next_can_be_and_rollback_goes_on(database, store, registry, tokenizer, tmp_path):
    anns, bobs = dialogue(store, tokenizer, ("ann", SECRET)), dialogue(store, tokenizer, ("bob", "hello"))
    first = taught(registry, tmp_path, [react(store, anns[0], True, "ann").id])
    second = taught(registry, tmp_path, [react(store, bobs[0], True, "bob").id])  # began at the base, replaced the first
    assert registry.get(second.name).replaced == first.name
    assert forget_person(database, registry, "test", "ann").policies == 1
    assert registry.get_live().name == second.name
    assert forget_person(database, registry, "test", "bob").policies == 1
    assert registry.get_live().name == BASE
    assert [one.text for one in store.read_messages(bobs[0].conversation_id)] == [""]


def test_a_platforms_user_who_is_called_like_the_bot_forgets_only_themselves(database, store, registry, tokenizer):
    [turn] = dialogue(store, tokenizer, ("bob", "hello"))
    assert store.read_message(turn.reply_id).author_id == "kibitz"
    assert forget_person(database, registry, "test", "kibitz").messages == 0
    assert store.find_turn(turn.id) == turn


def test_a_data_directory_from_before_is_converted(database, store, registry, tokenizer, tmp_path):
    _, second = dialogue(store, tokenizer, ("ann", SECRET), ("bob", "hello"))
    [third] = dialogue(store, tokenizer, ("bob", "good night"), shown={second.reply_id: 0.5})
    version = taught(registry, tmp_path, [react(store, third, True, "carol").id])
    after = Message(third.conversation_id, "dan", "thank you")
    store.add_message(after)
    with database.begin() as connection:
        connection.execute(followups.insert(), {"turn_id": third.id, "message_id": after.id, "chances": {"approval": 1.0}})
    registry.begin_run(version.name, {}, "", [], [after.id])
    tables = {}
    for revision in (None, "0006", "head"):
        if revision is not None:
            migrate(database, revision)
        with database.read() as connection:
            if revision != "0006":
                rows = connection.execute(sa.select(sources)).all(), connection.execute(sa.select(run_teachers)).all()
                tables[revision] = [set(found) for found in rows]
    assert tables["head"] == tables[None]
    assert {row.user_id for row in tables["head"][1]} == {"ann", "bob", "carol", "dan"}
    erased = forget_person(database, registry, "test", "ann")
    assert (erased.answers, erased.policies) == (3, 1)


@pytest.mark.parametrize("assumed", ["assumed", "asked"])
def test_only_those_teach_who_consent(config, database, store, tokenizer, tmp_path, assumed):
    privacy = PrivacyConfig(consent=assumed)
    users = Users(database, privacy)
    buffer = ReplayBuffer(store, tokenizer, config.model_copy(update={"privacy": privacy}))
    anns, after = dialogue(store, tokenizer, ("ann", "hello"), ("bob", "good night"))
    [bobs] = dialogue(store, tokenizer, ("bob", "hello"))
    for turn in (anns, after, bobs):
        react(store, turn, True, "bob")
    react(store, bobs, False, "ann")
    store.add_message(Message(bobs.conversation_id, "ann", "me too"))  # she takes part there

    def used() -> dict[str, float]:
        snapshot = buffer.snapshot()
        return {one.turn_id: one.reward for one in snapshot.training + snapshot.held_out}

    for name in ("ann", "bob"):
        assert users.has_consent("test", name) == (assumed == "assumed")
        users.record_consent("test", name, True)
    assert used() == {anns.id: 1.0, after.id: 1.0, bobs.id: pytest.approx(1 / 3)}  # bob asked, and weighs twice
    users.record_consent("test", "ann", False)
    assert used() == {bobs.id: 1.0}  # not her question, not what was shown her words, not her opinion
    assert buffer.snapshot().dropped["a person whose words it contains does not consent"] == 2
    assert export(store, tmp_path / "out", "", privacy)["feedback"] == 1  # nor by way of a file
    users.record_consent("test", "ann", True)
    assert len(used()) == 3
    assert export(store, tmp_path / "out", "", privacy)["feedback"] == 4


def test_nobody_teaches_or_is_remembered_by_way_of_an_answer_that_was_made_from_an_answer_to_the_unwilling(
    config, database, store, tokenizer, tmp_path
):
    """Of all that forgetting a person would take away nothing teaches while they withhold consent."""
    users, buffer = Users(database, config.privacy), ReplayBuffer(store, tokenizer, config)
    [first] = dialogue(store, tokenizer, ("ann", SECRET), channel="room")
    [second] = dialogue(store, tokenizer, ("bob", "what did she say?"), channel="room", shown={first.reply_id: 0.9})
    [third] = dialogue(store, tokenizer, ("carol", "what did he say?"), channel="room", shown={second.reply_id: 0.9})
    react(store, third, True, "carol")
    memory, replies = Memory(database), {first.reply_id, second.reply_id, third.reply_id}

    def used() -> set[str]:
        snapshot = buffer.snapshot()
        return {one.turn_id for one in snapshot.training + snapshot.held_out}

    for consents in (True, False):  # the control first
        users.record_consent("test", "ann", consents)
        assert used() == ({third.id} if consents else set())
        assert set(memory.find_visible(third.conversation_id, sorted(replies))) == (replies if consents else set())
        assert export(store, tmp_path / "out", "", config.privacy)["turns"] == (3 if consents else 0)


def test_an_edit_replaces_what_was_said_whatever_order_edits_come_in(store, tokenizer):
    [turn] = dialogue(store, tokenizer, ("ann", "helo"))
    said = store.read_message(turn.message_id)
    late, early = Message(turn.conversation_id, "ann", "late"), said
    store.edit_message(said.id, "hello there", late.at)
    store.edit_message(said.id, "hello", early.at)
    assert store.read_message(said.id).text == "hello there"
