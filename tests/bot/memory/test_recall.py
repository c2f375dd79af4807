"""Recall: what bears on a message is found, in its scope and nowhere else, and what is forgotten never again."""

import json
import random
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.chat.dialogue import clean_text
from bot.chat.tracker import StateTracker
from bot.config import DialogueConfig, PrivacyConfig
from bot.errors import ConfigError, DataError
from bot.memory import embedder as embedders
from bot.memory.embedder import Embedder
from bot.memory.index import Entry, ScopeIndex
from bot.memory.recall import OVERLAP, Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.store.forgetting import forget_message, forget_person
from bot.store.tables import embeddings
from bot.store.users import Users
from bot.types import Conversation, Message, SamplingParams, Turn, new_id, now
from learning.bench import recall as recall_benchmark
from learning.fitting.dialogues import make_dialogue

FACT = "my sister keeps eleven green parrots in the attic"
QUESTION = "how many parrots does her sister have?"


@pytest.fixture
def recall(database, embedder):
    found = Recall(Memory(database), embedder, load_retrieval_weights())
    yield found
    found._thread.shutdown()  # the embedder is everybody's


def tell(store, place: Conversation, text: str, author: str = "ann", **details) -> Message:
    message = Message(place.id, author, text, **details)
    store.add_message(message)
    return message


def crowded(store, **where) -> Conversation:
    """A place where much else was said."""
    place = store.open_conversation(Conversation("test", **{"channel": new_id(), **where}))
    for number in range(20):
        tell(store, place, f"today i did some work on part {number}", "bob")
    return place


async def found(recall: Recall, place: Conversation, text: str = QUESTION, author: str = "cleo") -> list[str]:
    return [one.message.text for one in await recall.find(Message(place.id, author, text), 4)]


async def test_the_best_is_first_and_the_same_each_time_with_vectors_and_without(store, recall):
    place = crowded(store)
    tell(store, place, FACT)
    assert (await found(recall, place))[0] == FACT  # by its words
    await recall.embed_missing(lambda *_: None)
    assert recall.memory.count_unembedded(recall.space) == 0
    first = await recall.find(Message(place.id, "cleo", "which birds live in the house of ann's family?"), 4)
    assert first[0].message.text == FACT  # by its meaning
    assert await recall.find(Message(place.id, "cleo", "which birds live in the house of ann's family?"), 4) == first
    fresh = Recall(recall.memory, recall.embedder, recall.weights)
    assert await fresh.find(Message(place.id, "cleo", "which birds live in the house of ann's family?"), 4) == first


async def test_what_is_said_is_found_by_the_next_message_and_embedded_soon(store, recall):
    place = crowded(store)
    assert FACT not in await found(recall, place)
    said = tell(store, place, FACT)
    assert (await found(recall, place))[0] == FACT
    recall.embed_later([said])
    await recall.flush()
    assert said.id not in {one for one, _ in recall.memory.find_unembedded(recall.space, "", 100)}


async def test_a_vector_that_comes_late_reaches_what_is_in_memory(store, recall):
    place = crowded(store)
    said = tell(store, place, FACT)
    for number in range(2 * OVERLAP):  # far more than are read again
        tell(store, place, f"and then there was number {number}")
    index = await recall.update_index(recall.read_scope(place))
    assert len(index.find_unembedded()) == len(index) == 21 + 2 * OVERLAP
    recall.embed_later([said])
    await recall.flush()
    assert said.id not in index.find_unembedded()
    assert len(index.find_unembedded()) == len(index) - 1  # the control: the others have none


async def test_what_was_written_in_another_order_than_it_was_made_is_not_missed(store, recall):
    place = crowded(store)
    early = Message(place.id, "ann", FACT)
    tell(store, place, "this was made later and written first")
    assert FACT not in await found(recall, place)
    store.add_message(early)
    assert (await found(recall, place))[0] == FACT


async def test_forgotten_edited_and_withheld_text_is_gone_from_the_next_request_on(store, registry, recall, database):
    place = crowded(store)
    said = [tell(store, place, f"{FACT} number {number}", f"person {number}") for number in range(3)]
    await recall.embed_missing(lambda *_: None)
    assert {one.text for one in said} <= set(await found(recall, place))
    forget_message(database, said[0].id)
    assert said[0].text not in await found(recall, place)
    users = Users(database, PrivacyConfig())
    users.record_consent("test", "person 1", consent=False)
    assert said[1].text not in await found(recall, place)
    users.record_consent("test", "person 1", consent=True)
    assert said[1].text in await found(recall, place)  # the control: it was the consent that hid it
    forget_person(database, registry, "test", "person 1")
    assert said[1].text not in await found(recall, place)
    store.edit_message(said[2].id, "nothing of the kind", now() + timedelta(seconds=1))
    await recall.mark_changed(place.id)
    assert [text for text in await found(recall, place) if "parrots" in text] == []
    with database.read() as connection:
        left = set(connection.execute(embeddings.select()).scalars("message_id"))
    assert left.isdisjoint({one.id for one in said})


async def test_an_answer_that_was_replaced_or_was_made_for_the_unwilling_is_not_remembered(
    store, recall, tokenizer, database
):
    place = crowded(store)
    asked = tell(store, place, "tell me something", "dora")
    made = Turn(place.id, asked.id, new_id(), FACT, "dora", "policy-0", (1,), (2,), (-0.1,), "stop", SamplingParams(), 1.0)
    store.add_turn(made)
    assert FACT in await found(recall, place)
    Users(database, PrivacyConfig()).record_consent("test", "dora", consent=False)
    assert FACT not in await found(recall, place)
    Users(database, PrivacyConfig()).record_consent("test", "dora", consent=True)
    assert FACT in await found(recall, place)
    store.add_turn(replace(made, id=new_id(), reply_id=new_id(), text="something else", replaces=made.id))
    assert FACT not in await found(recall, place)


@pytest.mark.parametrize("across", [False, True])
async def test_ten_thousand_canaries_and_no_leak(store, database, across):
    """Direct messages, private channels and public ones, each with words of its own that the others ask for."""
    rng = random.Random(0)
    places = [
        Conversation("test", f"{kind}-{number}", space=f"server-{server}", is_public=kind == "public")
        for server in range(4)
        for kind in ("direct", "private", "public")
        for number in range(5)
    ]
    planted = []
    for place in places:
        lines = [
            f"canary {place.channel} {place.space} sings {rng.randrange(10**9)}" for _ in range(10_000 // len(places) + 1)
        ]
        planted.append((place, [Message(place.id, "ann", line) for line in lines], [], []))
    store.add_dialogues(planted)
    recall = Recall(Memory(database, across), None, load_retrieval_weights())
    where = {place.id: place for place in places}
    leaks = seen_elsewhere = 0
    for place in places:
        for one in await recall.find(Message(place.id, "bob", "which canary sings in private direct public?"), 50):
            there = where[one.message.conversation_id]
            open_to_all = across and place.is_public and there.is_public and there.space == place.space
            seen_elsewhere += there != place
            leaks += there.id != place.id and not open_to_all
    assert leaks == 0
    assert (seen_elsewhere > 0) == across  # the control: what may cross does
    recall.close()


async def test_threads_of_a_channel_share_what_was_said_there(store, recall):
    thread = crowded(store, channel="general", thread="1")
    tell(store, thread, FACT)
    assert FACT in await found(recall, store.open_conversation(Conversation("test", "general", thread="2")))
    assert FACT not in await found(recall, store.open_conversation(Conversation("test", "other", thread="2")))


async def test_a_channel_that_was_closed_is_not_seen_from_outside_any_more(store, database):
    recall = Recall(Memory(database, across_channels=True), None, load_retrieval_weights())
    there = crowded(store, channel="open", is_public=True)
    tell(store, there, FACT)
    here = crowded(store, channel="here", is_public=True)
    assert FACT in await found(recall, here)
    store.open_conversation(Conversation("test", "open", is_public=False))
    assert FACT not in await found(recall, here)
    recall.close()


async def test_vectors_of_another_model_are_made_anew_and_never_compared(store, recall, database):
    place = crowded(store)
    said = tell(store, place, FACT)
    recall.memory.store_vectors([(said.id, FACT)], np.ones((1, 7), np.float32), "another model")
    await found(recall, place)  # seven dimensions would not fit
    told = []
    await recall.embed_missing(lambda stage, done, total: told.append((done, total)))
    assert told[-1] == (21, 21)
    with database.read() as connection:
        assert {row.space for row in connection.execute(embeddings.select())} == {recall.space}
    recall.memory.store_vectors([(said.id, "what it said before it was edited")], np.ones((1, 7), np.float32), "late")
    with database.read() as connection:
        assert "late" not in {row.space for row in connection.execute(embeddings.select())}


@pytest.mark.slow
@pytest.mark.parametrize("remembered", [DialogueConfig().remembered, 0])
async def test_who_refers_to_what_was_said_fifty_turns_ago_is_understood(store, recall, tokenizer, remembered):
    """Simulated people: for at least 95 of 100 it is in the prompt; by recency alone, for none."""
    tracker = StateTracker(store, tokenizer, recall, DialogueConfig(recent=50, remembered=remembered), 2048)
    shown = []
    for seed in range(8):
        made = make_dialogue(500 + seed, turns=200)
        place = store.open_conversation(Conversation("test", new_id()))
        said = [Message(place.id, turn["speaker"], turn["text"]) for turn in made.conversation]
        store.add_dialogues([(place, said, [], [])])
        await recall.embed_missing(lambda *_: None)
        for question in made.questions:
            wanted = said[int(question["evidence"][0])]
            if wanted not in said[-50:]:
                context = await tracker.build_context(Message(place.id, "somebody", question["text"]))
                assert len(context.prompt_ids) <= 2048
                shown.append(tokenizer.neutralise(wanted.text) in str(context.messages[0]["content"]))
    assert np.mean(shown) >= 0.95 if remembered else not any(shown), np.mean(shown)


STRANGE = [
    "",
    "?",
    "x" * 100_000,
    "👍" * 300,
    "東京タワーはどこですか",
    "ภาษาไทยไม่มีช่องว่าง",
    "def f(x):\n  return x",
    "[[[" * 900,
]
TEXTS = st.one_of(st.text(max_size=200), st.sampled_from(STRANGE))


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.tuples(st.sampled_from(["ann", "李雷", "x.y", "(", ""]), TEXTS), max_size=12), question=TEXTS)
def test_any_text_is_ranked_in_bounded_time_and_nothing_is_lost(texts, question):
    index = ScopeIndex()
    entries = [Entry(f"{n:03}", "c", speaker, clean_text(text)) for n, (speaker, text) in enumerate(texts)]
    index.add(entries[:5])
    index.add(entries)
    order, scores = index.rank(clean_text(question), None, "ann", load_retrieval_weights())
    assert sorted(order) == list(range(len(texts)))
    assert np.isfinite(scores).all()
    assert index.find_unembedded() == [entry.id for entry in entries]


def test_a_name_in_a_question_says_who_and_is_no_word_to_look_for():
    index = ScopeIndex()
    said = [("night_owl42", "hi Emily Chen!"), ("Emily Chen", "good night, owl lovers"), ("bob", "Emily is here")]
    index.add(Entry(str(n), "c", speaker, text) for n, (speaker, text) in enumerate(said))
    assert index.extract_speakers("what did @night_owl42's cat eat?") == ({0}, "what did   cat eat?")
    assert index.extract_speakers("what does Emily like?")[0] == {1}
    assert index.extract_speakers("is the owl awake?") == (set(), "is the owl awake?")
    assert index.extract_speakers("Emily Chen") == ({1}, "Emily Chen")  # nothing else is left to look for
    assert index.extract_speakers("what is my name?", asker="bob")[0] == {2}


def test_where_words_have_no_spaces_they_are_found_all_the_same():
    index = ScopeIndex()
    texts = ["昨日は東京タワーに行きました", "今日は雨です", "猫が好きです"]
    index.add(Entry(str(n), "c", "ann", text) for n, text in enumerate(texts))
    order, _ = index.rank("東京タワーはいつ？", None, "", {"bm25": 1.0})
    assert order[0] == 0


async def test_an_embedder_that_is_not_there_names_the_key_and_the_fix(tmp_path):
    missing = Embedder("/nowhere/model", tmp_path)
    with pytest.raises(ConfigError, match=r"dialogue\.embedder.*'none'"):
        await missing.embed(["hello"])
    missing.close()


@pytest.fixture
def exported(tmp_path, monkeypatch) -> list[Path]:
    """The files that were exported. The user's cache is `tmp_path / "cache"`."""
    found: list[Path] = []

    def export(name: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        for made in (file, file.with_suffix(".json")):
            made.write_text(name)
        found.append(file)

    monkeypatch.setattr(embedders, "_export", export)
    monkeypatch.setenv("KIBITZ_CACHE", str(tmp_path / "cache"))
    return found


def test_the_packaged_model_is_exported_once_for_each_user_and_another_once_for_each_data_directory(tmp_path, exported):
    one, two = tmp_path / "one", tmp_path / "two"
    found = {embedders._find_or_export(embedders.BUNDLED, data) for data in (one, two, one)}
    assert len(exported) == len(found) == 1
    assert exported[0].parent == tmp_path / "cache"
    exported.clear()
    assert [embedders._find_or_export("own/model", data).parent for data in (one, two, one)] == [
        data / "embedders" for data in (one, two, one)
    ]
    assert len(exported) == 2


def test_where_the_users_cache_cannot_be_written_to_the_model_lies_in_the_data_directory(tmp_path, exported):
    (tmp_path / "cache").write_text("a file")
    data = tmp_path / "data"
    for _ in range(2):
        assert embedders._find_or_export(embedders.BUNDLED, data).parent == data / "embedders"
    assert len(exported) == 1


def test_the_small_model_means_what_the_whole_one_means(embedder):
    near, far = embedder.encode(["which birds does she have?", "the tax form is due"]) @ embedder.encode([FACT])[0]
    assert near > far + 0.2
    assert np.allclose(np.linalg.norm(embedder.encode(["", "x" * 100_000]), axis=1), 1, atol=1e-5)
    assert embedder.encode([]).shape[0] == 0


async def test_the_benchmark_of_recall_counts_what_is_found_and_says_what_it_cannot_use(embedder, tmp_path):
    def another() -> Embedder:  # the benchmark closes its own
        return Embedder(embedder.name, embedder._data)

    file = tmp_path / "asked.jsonl"
    made = make_dialogue(3, turns=120)
    made.questions += [{"text": "what?", "evidence": []}, {"text": "who?", "evidence": ["nowhere"]}]
    file.write_text(recall_benchmark.format_json_lines([made]))
    told: list[int] = []
    asked = recall_benchmark.read(file)
    figures = await recall_benchmark.measure(
        asked, another(), load_retrieval_weights(), lambda *progress: told.append(progress[1])
    )
    assert figures["questions"] == len(made.questions) - 2
    assert figures["left_out"] == 2
    assert figures["recall_at_10"] > 70 > 30 > figures["recency_recall_at_10"]
    blind = await recall_benchmark.measure(asked, another(), {"length": -1.0}, lambda *_: None)
    assert blind["recall_at_10"] < 30  # the control: with a signal that knows nothing it finds nothing
    assert told == [1]
    for bad in ("", "{}", '{"conversation": [], "questions": []}', json.dumps(vars(make_dialogue(3)) | {"questions": []})):
        file.write_text(bad)
        with pytest.raises(DataError, match=r"asked\.jsonl"):
            recall_benchmark.read(file)
    for bad, found in (
        ("so it goes", "Invalid JSON"),
        ('{"conversation": 5, "questions": []}', "conversation: Input should"),
    ):
        file.write_text(f"\n{bad}")
        with pytest.raises(DataError, match=rf'asked\.jsonl, line 2: {found}.*; each line must be {{"conversation": '):
            recall_benchmark.read(file)


async def test_what_is_older_than_what_is_in_memory_is_found_by_its_words(store, recall, monkeypatch):
    monkeypatch.setattr("bot.memory.recall.WINDOW", 40)
    monkeypatch.setattr("bot.memory.recall.OVERLAP", 8)
    place = store.open_conversation(Conversation("test", "general", thread="0"))
    tell(store, place, FACT)
    for number in range(1, 120):  # one conversation a mention
        tell(
            store,
            store.open_conversation(replace(place, id=new_id(), thread=str(number))),
            f"today i did some work on part {number}",
        )
    newest = store.open_conversation(replace(place, id=new_id(), thread="120"))
    assert (await found(recall, newest))[0] == FACT
    index = recall.read_scope(newest).index
    for number in range(30):
        tell(store, newest, f"and then there was number {number}")
        assert (await found(recall, newest))[0] == FACT
        assert 40 <= len(index) <= 50
    assert recall.read_scope(newest).index is index
    monkeypatch.setattr("bot.memory.recall.OLDER", 0)
    assert FACT not in await found(recall, newest), "the control: it is not in memory"


async def test_what_was_said_while_nobody_asked_is_in_memory_without_a_gap(store, recall, monkeypatch):
    monkeypatch.setattr("bot.memory.recall.WINDOW", 40)
    monkeypatch.setattr("bot.memory.recall.OVERLAP", 8)
    place = crowded(store)
    await found(recall, place)
    said = [tell(store, place, f"then the red banana number {number} came") for number in range(100)]
    index = await recall.update_index(recall.read_scope(place))
    assert index.ids == [one.id for one in said[-40:]]
    assert said[17].text in await found(recall, place, "which banana was number 17?"), "the database finds it"


@given(
    texts=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ann", "bob", "cleo"]), TEXTS), max_size=14),
    data=st.data(),
)
def test_an_index_without_its_oldest_ranks_as_one_that_never_had_them_and_with_older_ones_as_one_of_all(texts, data):
    rng, count = np.random.default_rng(0), data.draw(st.integers(0, len(texts)))
    entries = [
        Entry(
            f"{n:03}",
            place + "old" * (n < count),  # what is older is not followed by what is in memory
            speaker,
            clean_text(text),
            rng.integers(-9, 9, 5).astype(np.int8) if n % 3 else None,
        )
        for n, (place, speaker, text) in enumerate(texts)
    ]
    question, vector = data.draw(TEXTS), np.ones(5, np.float32)

    def ranked(index: ScopeIndex) -> list[tuple[str, float, bool]]:
        _, scores = index.rank(question, vector, "ann", load_retrieval_weights())
        return list(
            zip(index.ids, np.round(scores, 5).tolist(), index.find_near(question, vector, "ann").tolist(), strict=True)
        )

    def index_of(some: list[Entry]) -> ScopeIndex:
        made = ScopeIndex()
        made.add(some)
        return made

    small, whole = index_of(entries[count:]), index_of(entries)
    assert ranked(small.with_older(entries[:count], question)) == ranked(whole)
    before = ranked(small)
    whole.drop_oldest(count)
    assert ranked(whole) == before
    assert (whole.rows, whole.speakers.keys()) == (small.rows, small.speakers.keys())
    assert [whole.has_content_besides(place, ()) for place in "abc"] == [
        small.has_content_besides(place, ()) for place in "abc"
    ]
    extra = Entry("999", "a", "dora", "my sister keeps green parrots")
    whole.add([extra])
    small.add([extra])
    assert ranked(whole) == ranked(small)
