"""State: topics, participants, open questions, and facts of which the newest holds."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from conftest import ROOT

from bot.chat.texts import describe_state
from bot.memory.facts import find_facts, resolve_facts
from bot.memory.state import derive_state
from bot.types import FORGOTTEN, Message, Role
from learning.fitting import topics

TIAGE = ROOT.parent / "shared" / "data" / "tiage"
START = datetime(2026, 1, 1, tzinfo=UTC)


def said(*lines: tuple[str, str]) -> list[Message]:
    return [
        Message("place", author, text, Role.ASSISTANT if author == "kibitz" else Role.USER, at=START + timedelta(minutes=n))
        for n, (author, text) in enumerate(lines)
    ]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("hi, I'm allergic to nuts, so no cake for me", ["ann is allergic to nuts"]),
        ("Actually I am allergic to shellfish and not nuts", ["ann is allergic to shellfish"]),
        ("we talked, my name is Zoë. I live in Porto now!", ["ann name Zoë", "ann lives in Porto"]),
        ("My favourite colour is dark green", ["ann favourite colour dark green"]),
        ("my sister's name is Laura but i don't eat meat", ["ann sister's name Laura", "ann does not eat meat"]),
        ("am I allergic to nuts?", []),
        ("I'm allergic to what?", []),
        ("she said he lives in Porto", []),
        ("I'm an accountant.", ["ann is a accountant"]),
        ("", []),
        ("i love " + "x" * 100_000, ["ann loves " + "x" * 80]),
    ],
)
def test_facts_are_read_from_what_people_state_about_themselves(text, facts):
    assert sorted(map(str, find_facts(Message("place", "ann", text)))) == sorted(facts)
    assert find_facts(Message("place", "kibitz", text, Role.ASSISTANT)) == []


def test_the_newest_fact_holds_and_the_old_one_stays_in_the_record():
    lines = said(
        ("ann", "i'm allergic to nuts"),
        ("bob", "i'm allergic to cats"),
        ("ann", "sorry, I am allergic to shellfish"),
        ("ann", "i love jazz"),
        ("ann", "i love opera"),
        ("ann", "i hate jazz"),
    )
    holding, former = resolve_facts(reversed(lines))
    assert sorted(map(str, holding)) == [
        *("ann hates jazz", "ann is allergic to shellfish", "ann loves opera", "bob is allergic to cats"),
    ]
    assert list(map(str, former)) == ["ann is allergic to nuts", "ann loves jazz"]


@pytest.mark.parametrize("with_embedder", [True, False])
def test_what_is_open_is_what_nobody_answered(embedder, with_embedder):
    lines = said(
        ("ann", "does anybody know when the library opens on sundays?"),
        ("bob", "the library opens at ten on sundays"),
        ("cleo", "where did i leave my umbrella?"),
        ("bob", "lovely weather"),
        ("ann", "remind me to call the dentist"),
        ("bob", "who wants pizza?"),
    )
    lines.append(Message("place", "kibitz", "Me!", Role.ASSISTANT, reply_to=lines[-1].id, at=START + timedelta(hours=1)))
    found = derive_state(lines, embedder if with_embedder else None)
    assert [one.text for one in found.unanswered] == ["where did i leave my umbrella?", "remind me to call the dentist"]
    assert found.participants == {"bob": 3, "ann": 2, "cleo": 1}
    assert next(iter(found.participants)) == "bob"


def test_a_topic_begins_where_something_else_is_talked_about(embedder):
    lines = said(
        ("ann", "my tomatoes are growing so well in the garden this year"),
        ("bob", "do you water the tomatoes every day?"),
        ("ann", "yes, and i put compost on the garden in spring"),
        ("bob", "my tomatoes in the garden got eaten by snails"),
        ("ann", "the stock market crashed this morning, have you read the news about the banks?"),
        ("bob", "yes, the banks are in trouble and the stock market fell by ten percent"),
    )
    assert derive_state(lines, embedder).topic == lines[4:]
    assert derive_state(lines[:4], embedder).topic == lines[:4]  # the control: without the turn there is one topic


@pytest.mark.skipif(not TIAGE.is_dir(), reason="the data set is not beside the project")
def test_topics_are_told_apart_about_as_well_as_on_what_was_learned_from(embedder):
    known, unknown = (topics.read(TIAGE / f"{name}.json") for name in ("train", "test"))
    learned, figures = topics.fit_and_judge(known[:100], unknown, embedder, lambda *_: None)
    assert figures["f1"] > figures["cosine_f1"] > figures["always_f1"]
    assert len(learned["weights"]) == 10


def test_nothing_strange_or_forgotten_harms_it(embedder):
    for texts in ([], [""], ["?"], ["👍" * 300], ["x" * 1_000_000], ["東京タワーはどこ？", "\ufffd"]):
        lines = said(*(("ann", text) for text in texts))
        for model in (embedder, None):
            assert describe_state(derive_state(lines, model))
    gone = Message("place", FORGOTTEN, "", at=START)
    assert describe_state(derive_state([gone], embedder)) == "no messages"
    many = said(*(("ann", f"is it {number}?") for number in range(10_000)))
    assert len(derive_state(many, None).unanswered) == 400


def test_a_file_that_is_no_marked_dialogues_is_refused(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([1, 2]))
    with pytest.raises(Exception, match=r"bad\.json cannot be read"):
        topics.read(bad)
    assert topics.f1(np.array([True, False]), np.array([True, True])) == pytest.approx(2 / 3)
