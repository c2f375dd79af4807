"""What is forgotten is gone: text, embeddings, feedback, and the policy versions that learned from it (law 10)."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import answered, react

from bot.config import PrivacyConfig
from bot.forgetting import SAMPLES, forget_message, forget_person
from bot.memory import Memory
from bot.registry import BASE
from bot.tables import followups
from bot.types import Conversation, Feedback, FeedbackKind, Message, PolicyState, new_id
from bot.users import Users
from learning.kibitz_export import export
from learning.replay_buffer import ReplayBuffer

SECRET = "xyzzy-4711"  # what Ann says, and nobody else


def dialogue(store, tokenizer, *said: tuple[str, str], channel: str = ""):
    """One conversation: each message with its answer, which was shown all that was said before."""
    place = store.open(Conversation("test", channel=channel or new_id()))
    before: list[str] = []
    turns = []
    for author, text in said:
        turn = answered(
            store, tokenizer, text, f"you said {text}", author=author, place=place, shown=dict.fromkeys(before, None)
        )
        turns.append(turn)
        before += [turn.message_id, turn.reply_id]
    return turns


def everything_on_disk(data: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(data.rglob("*")) if path.is_file())


def taught(registry, tmp_path: Path, feedback: list[str], parent: str = BASE, probe: str = SECRET):
    """A version with files of its own that a run on this feedback made."""
    version = registry.reserve(registry.get(parent), tmp_path / "policies")
    registry.begin_run(version.name, {}, "", feedback)
    Path(version.path).mkdir(parents=True)
    (Path(version.path) / "probe.json").write_text(probe)
    registry.complete(version.name, "", {})
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
    version = registry.reserve(registry.get(BASE), tmp_path / "policies")
    registry.begin_run(version.name, {}, "", [], [after.id])
    registry.complete(version.name, "", {})
    assert registry.runs_that_used([], [after.id]) == [version.name]
    erased = forget_person(database, registry, "test", person)
    assert erased.policies == (person == "ann")  # the control: Bob said nothing
    assert (registry.get(version.name).state == PolicyState.PURGED) == (person == "ann")


def test_a_forgotten_person_leaves_nothing_anywhere(config, database, store, registry, tokenizer, tmp_path):
    anns, bobs = dialogue(store, tokenizer, ("ann", SECRET), ("bob", "hello"))
    [apart] = dialogue(store, tokenizer, ("bob", "good night"))
    Memory(database).keep([(anns.message_id, SECRET)], np.ones((1, 4), np.float32), "m")
    kept = react(store, apart, True, "bob")
    seen = [react(store, anns, True, "bob"), react(store, bobs, True, "bob"), react(store, apart, False, "ann")]
    store.add_feedback(Feedback(apart.id, "ann", FeedbackKind.COMMENT, text=SECRET))
    clean = taught(registry, tmp_path, [kept.id], probe="")
    (Path(clean.path) / SAMPLES).write_text(SECRET)  # it was held out there
    first = taught(registry, tmp_path, [seen[0].id], parent=clean.name)
    child = taught(registry, tmp_path, [kept.id], parent=first.name)
    assert SECRET.encode() in everything_on_disk(config.data)  # the control: it was there
    erased = forget_person(database, registry, "test", "ann")
    assert SECRET.encode() not in everything_on_disk(config.data)
    assert (erased.messages, erased.answers, erased.opinions, erased.policies) == (1, 2, 4, 2)
    assert store.turn(anns.id) is store.turn(bobs.id) is None  # Bob's answer was made from Ann's words
    assert [turn.id for turn in store.turns_with_feedback()] == [apart.id]
    assert [row.id for row in store.feedback_of([apart.id])[apart.id]] == [kept.id]
    assert [message.text for message in store.messages(anns.conversation_id)] == ["", "hello"]
    assert registry.live().name == clean.name
    assert [registry.get(one.name).state for one in (first, child)] == [PolicyState.PURGED] * 2
    assert [Path(one.path).exists() for one in (clean, first, child)] == [True, False, False]
    assert (Path(clean.path) / "probe.json").is_file()


def test_nobody_else_is_touched_and_forgetting_twice_is_forgetting_once(database, store, registry, tokenizer, tmp_path):
    [turn] = dialogue(store, tokenizer, ("bob", "hello"))
    given = react(store, turn, True, "bob")
    version = taught(registry, tmp_path, [given.id])
    for _ in range(2):
        assert forget_person(database, registry, "test", "ann").messages == 0
    forget_person(database, registry, "elsewhere", "bob")  # another platform's bob is another person
    assert store.turn(turn.id) == turn
    assert registry.live().name == version.name


def test_an_answer_that_was_under_way_while_its_question_was_forgotten_is_not_kept(database, store, registry, tokenizer):
    [anns] = dialogue(store, tokenizer, ("ann", SECRET))
    question = store.message(anns.message_id)
    forget_person(database, registry, "test", "ann")
    counted = store.counts()
    for shown in ({}, {question.id: None}):
        asked = Message(anns.conversation_id, "bob", "hello")
        store.add_message(asked)
        message_id = question.id if not shown else asked.id
        with pytest.raises(Exception, match="forgotten meanwhile"):
            answered(store, tokenizer, "hello", SECRET, message_id=message_id, shown=shown)
    assert store.counts()["turns"] == counted["turns"]


def test_the_event_of_a_forgotten_message_is_still_known(database, store, registry):
    place = store.open(Conversation("test", "events"))
    store.add_message(Message(place.id, "ann", SECRET, event_id="e1"))
    forget_person(database, registry, "test", "ann")
    assert not store.add_message(Message(place.id, "ann", SECRET, event_id="e1"))  # delivered again, or reconciled
    assert store.message_of_event("e1").is_forgotten


def test_a_deleted_message_goes_with_its_answer_and_moves_no_version(database, store, registry, tokenizer, tmp_path):
    first, second = dialogue(store, tokenizer, ("ann", "hello"), ("ann", SECRET))
    given = react(store, second, True, "ann")
    version = taught(registry, tmp_path, [given.id])
    forget_message(database, second.message_id)
    assert store.turn(second.id) is None
    assert store.turn(first.id) == first
    assert registry.live().name == version.name


async def test_what_is_forgotten_amid_other_work_is_gone_from_the_files_too(config, database, store, tokenizer):
    first, second = dialogue(store, tokenizer, ("ann", "hello"), ("ann", SECRET))
    given = [Feedback(first.id, f"user{number}", FeedbackKind.APPROVAL) for number in range(4)]
    work = [database.call(time.sleep, 0.05), *(database.call(store.add_feedback, one) for one in given[:2])]
    work += [database.call(forget_message, database, second.message_id)]  # in one transaction with what is beside it
    await asyncio.gather(*work, *(database.call(store.add_feedback, one) for one in given[2:]))
    assert len(store.feedback_of([first.id])[first.id]) == 4
    assert SECRET.encode() not in everything_on_disk(config.data)


def test_a_run_whose_teacher_is_forgotten_meanwhile_leaves_no_version(database, store, registry, tokenizer, tmp_path):
    [turn] = dialogue(store, tokenizer, ("ann", SECRET))
    given = react(store, turn, True, "ann")
    version = registry.reserve(registry.get(BASE), tmp_path / "policies")
    registry.begin_run(version.name, {}, "", [given.id])
    forget_person(database, registry, "test", "ann")
    with pytest.raises(Exception, match="purged and cannot become candidate"):
        registry.complete(version.name, "", {})


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
        assert users.consents("test", name) == (assumed == "assumed")
        users.decide("test", name, True)
    assert used() == {anns.id: 1.0, after.id: 1.0, bobs.id: pytest.approx(1 / 3)}  # bob asked, and weighs twice
    users.decide("test", "ann", False)
    assert used() == {bobs.id: 1.0}  # not her question, not what was shown her words, not her opinion
    assert buffer.snapshot().dropped["somebody in it does not consent"] == 2
    assert export(store, tmp_path / "out", "", privacy)["feedback"] == 1  # nor by way of a file
    users.decide("test", "ann", True)
    assert len(used()) == 3
    assert export(store, tmp_path / "out", "", privacy)["feedback"] == 4


def test_an_edit_replaces_what_was_said_whatever_order_edits_come_in(store, tokenizer):
    [turn] = dialogue(store, tokenizer, ("ann", "helo"))
    said = store.message(turn.message_id)
    late, early = Message(turn.conversation_id, "ann", "late"), said
    store.edit_message(said.id, "hello there", late.at)
    store.edit_message(said.id, "hello", early.at)
    assert store.message(said.id).text == "hello there"
