"""Follow-ups: what people say next is recorded as what it says about the answer before it."""

import json

import numpy as np
import pytest
from conftest import ROOT

from bot.chat.dialogue import DialogueManager
from bot.memory.followups import KINDS, FollowUps, compute_features, predict_chances
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.store.forgetting import forget_message
from bot.types import Conversation, Message, SamplingParams, Turn, new_id
from learning.fitting import followups

QUESTION, ANSWER = "how do i cook rice?", "Boil it in milk for an hour."


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("thanks a lot, that was very helpful!", "approval"),
        ("no, that's completely wrong", "disapproval"),
        ("actually, it should be water", "correction"),
        ("how do i cook rice??", "repetition"),
        ("we went to the beach with my cousins on saturday", "other"),
    ],
)
def test_what_a_follow_up_says(embedder, text, kind):
    found = predict_chances(compute_features(text, QUESTION, ANSWER, embedder.encode([text, QUESTION, ANSWER])))
    assert max(found, key=found.get) == kind
    assert sum(found.values()) == pytest.approx(1)


def test_the_same_words_after_another_question_are_no_repetition(embedder):
    """The control: it is the comparison with the question that tells."""
    text, other = QUESTION, "who won the game last night?"
    again = predict_chances(compute_features(text, QUESTION, ANSWER, embedder.encode([text, QUESTION, ANSWER])))
    fresh = predict_chances(compute_features(text, other, ANSWER, embedder.encode([text, other, ANSWER])))
    assert again["repetition"] > 0.5 > fresh["repetition"]


def test_what_is_shipped_is_what_the_script_learns_and_it_is_calibrated(embedder):
    learned, figures = followups.fit(0, embedder, lambda *_: None)
    shipped = json.loads(ROOT.joinpath("bot/memory/followup_weights.json").read_text())
    assert np.allclose(learned["weights"], shipped["weights"], atol=0.02)
    assert figures["accuracy"] > 0.7
    assert figures["calibration_error"] < 0.15
    inputs, kinds = followups.make_examples("judge", 0, embedder, lambda *_: None)
    shuffled = np.random.default_rng(0).permutation(kinds)
    guessed = np.array([KINDS.index(max(found, key=found.get)) for found in map(predict_chances, inputs)])
    assert (
        (guessed == kinds).mean() > 0.7 > 0.5 > (guessed == shuffled).mean()
    )  # the control: against shuffled truth it fails


async def test_it_is_recorded_for_the_answer_before_it_and_forgotten_with_it(store, database, embedder):
    recall = Recall(Memory(database), embedder, load_retrieval_weights())
    noted = FollowUps(recall)
    place = store.open_conversation(Conversation("test", new_id()))

    def say(text: str, author: str = "ann") -> Message:
        message = Message(place.id, author, text)
        store.add_message(message)
        return message

    asked = say(QUESTION)
    turn = Turn(place.id, asked.id, new_id(), ANSWER, "ann", "policy-0", (1,), (2,), (-0.1,), "stop", SamplingParams(), 1.0)
    store.add_turn(turn)
    thanks, other = say("thanks, that's perfect"), say("thanks, that's perfect", "bob")
    assert await noted.record(thanks) is None  # nothing has a vector yet
    await recall.embed_missing(lambda *_: None)
    found = await noted.record(thanks)
    assert (found.turn_id, found.kind) == (turn.id, "approval")
    assert await noted.record(other) is None  # Bob did not ask
    assert await noted.record(asked) is None  # nothing was answered before it
    assert [one.kind for one in noted.find_for_turn(turn.id)] == ["approval"]
    forget_message(database, thanks.id)
    assert noted.find_for_turn(turn.id) == []
    again = say("no, that's completely wrong")
    await recall.embed_missing(lambda *_: None)
    assert (await noted.record(again)).kind == "disapproval"
    forget_message(database, asked.id)
    assert noted.find_for_turn(turn.id) == []
    recall._thread.shutdown()


async def test_a_running_kibitz_notes_them_and_they_are_no_reward(live):
    dialogue: DialogueManager = live.dialogue
    place = await dialogue.open(Conversation("test", new_id()))
    first = await dialogue.respond(Message(place.id, "ann", "tell me a joke"))
    await dialogue.respond(Message(place.id, "ann", "no, that's completely wrong"))
    while dialogue._follow_up_tasks:
        await next(iter(dialogue._follow_up_tasks))
    [found] = dialogue.followups.find_for_turn(first.id)
    assert set(found.chances) == set(KINDS)
    assert (await dialogue.explain(first.id)).feedback == []
