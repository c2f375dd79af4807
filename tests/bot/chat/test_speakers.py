"""Who says what: names where several people talk, and what was said before to somebody else."""

from dataclasses import replace
from datetime import timedelta

import pytest
from conftest import answered
from hypothesis import given
from hypothesis import strategies as st

from bot.chat.dialogue import DialogueManager
from bot.chat.speakers import LONGEST_NAME, clean_name, with_speakers
from bot.chat.tracker import StateTracker
from bot.config import DialogueConfig
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import Policy
from bot.store.deliveries import Deliveries
from bot.store.forgetting import forget_message
from bot.types import FORGOTTEN, Conversation, Message, Role, StoredMessage, now

HERE = Conversation("test", "lobby", "server", "1")


def said(author: str, text: str, **details) -> Message:
    return Message("", author, text, author_name=f"name of {author}" if author else "", **details)


@pytest.fixture
def tracker(store, tokenizer, database):
    recall = Recall(Memory(database), None, load_retrieval_weights())
    yield StateTracker(store, tokenizer, recall, DialogueConfig(), 512)
    recall.close()


@pytest.fixture
async def dialogue(store, tracker, config):
    policy = Policy("http://127.0.0.1:9", config.policy)  # nobody is answered here
    yield DialogueManager(store, tracker, policy)
    await policy.close()


def test_names_stand_where_several_people_talk_and_nowhere_else():
    alone = [said("ann", "hello"), Message("", "kibitz", "Hi!", Role.ASSISTANT), said("ann", "bye")]
    assert with_speakers(alone) == alone
    texts = [one.text for one in with_speakers([*alone, said("bob", "who am i?"), Message("", "cleo", "no name")])]
    assert texts == ["name of ann: hello", "Hi!", "name of ann: bye", "name of bob: who am i?", "no name"]


@given(name=st.text(max_size=300))
def test_a_name_is_one_short_line_that_ends_where_it_should(name):
    found = clean_name(name)
    assert len(found) <= LONGEST_NAME
    assert ":" not in found
    assert found.splitlines() in ([], [found])


async def ask(dialogue, question: Message, earlier: list[Message], place: Conversation = HERE) -> StoredMessage:
    await dialogue.overhear(place, earlier, question.at)
    return await dialogue.hear(place, question)


async def test_what_was_said_before_to_somebody_else_is_shown_with_its_speaker(dialogue, tracker):
    earlier = [said("bob", "the meeting moved to ten"), said("cleo", "oh no")]
    heard = await ask(dialogue, said("ann", "is this true?"), earlier)
    context = await tracker.build_context(heard.message)
    assert "\n".join(one["content"] for one in context.messages) == (
        "name of bob: the meeting moved to ten\nname of cleo: oh no\nname of ann: is this true?"
    )
    assert set(context.shown) == {one.id for one in earlier}  # so that they are forgotten with it


async def test_what_was_said_before_comes_before_the_question_whatever_the_clocks_say(dialogue, store):
    earlier = [said("bob", text, at=now() + timedelta(hours=1)) for text in ("one", "two")]
    heard = await ask(dialogue, said("ann", "three"), earlier)
    assert [one.text for one in store.read_recent_messages(heard.place.id, heard.message, 9)] == ["one", "two"]


async def test_what_was_said_before_is_stored_once_and_stays_where_it_was_said(dialogue, store):
    before = said("bob", "one", event_id="event 1")
    heard = await ask(dialogue, said("ann", "two"), [before])
    await ask(dialogue, said("ann", "three"), [before])
    elsewhere = await ask(dialogue, said("ann", "four"), [before], replace(HERE, thread="2", id="another"))
    texts = [[one.text for one in store.read_messages(place.id)] for place in (heard.place, elsewhere.place)]
    assert texts == [["one", "two", "three"], ["four"]]


async def test_a_place_begins_with_the_first_message_that_was_answered(dialogue, store, tokenizer, database):
    deliveries = Deliveries(database)
    heard = await ask(dialogue, said("ann", "two", event_id="event 2"), [said("bob", "one", event_id="event 1")])
    assert deliveries.find_first_question_event(HERE) is None
    for event in ("event 2", "event 3"):
        question = (
            store.find_message_of_event(event) or store.add_message_at(HERE, said("ann", "more", event_id=event)).message
        )
        answered(store, tokenizer, "", "Yes.", place=heard.place, message_id=question.id)
    assert deliveries.find_first_question_event(HERE) == "event 2"
    assert deliveries.find_first_question_event(replace(HERE, thread="2")) is None


async def test_a_message_that_is_declined_leaves_no_words_and_is_never_new_again(dialogue, store):
    assert await dialogue.decline(HERE, "event")
    assert not await dialogue.decline(HERE, "event")
    assert not (await dialogue.hear(HERE, said("ann", "spam", event_id="event"))).is_new
    [kept] = store.read_messages(store.open_conversation(HERE).id)
    assert (kept.author_id, kept.text, kept.author_name) == (FORGOTTEN, "", "")


async def test_a_name_is_forgotten_with_the_message(store, database):
    heard = store.add_message_at(HERE, said("ann", "hello"))
    assert store.read_message(heard.message.id).author_name == "name of ann"
    forget_message(database, heard.message.id)
    assert store.read_message(heard.message.id).author_name == ""
