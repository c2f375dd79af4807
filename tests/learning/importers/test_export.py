"""kibitz's own export: whatever was said is written, read back as it was, and not written without consent."""

import json
import shutil

import pytest
from conftest import answered, react
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.config import PrivacyConfig, load
from bot.errors import DataError
from bot.models.tokenizer import ChatTokenizer
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.users import Users
from bot.types import Candidate, Conversation, Feedback, FeedbackKind, Selection, new_id
from learning.data.replay_buffer import ReplayBuffer
from learning.importers.formats import read_recording
from learning.importers.kibitz_export import export

# What no database keeps is replaced before it is stored.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1) | st.sampled_from(
    ["\u2028", "\u2029", "\u0085", "\ufeff", "\r\n", "\x1e", '"\\u2028"', "\\", "{}\n{}", "\x0b\x0c\x1c", "\ufffe", "🏳️‍🌈"]
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A database of its own for many examples, and a place for their files."""
    place = tmp_path_factory.mktemp("export")
    database = Database(f"sqlite:///{place / 'kibitz.db'}")
    database.upgrade()
    yield ConversationStore(database), place
    database.close()


@settings(max_examples=100)
@given(question=TEXTS, reply=TEXTS, wanted=TEXTS, name=TEXTS.map(lambda text: text[:64]))
def test_an_export_reads_back_whatever_was_said(shelf, tokenizer, question, reply, wanted, name):
    store, place = shelf
    with store.database.begin() as connection:
        for table in ("feedback", "sources", "turns", "words", "messages", "conversations"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    turn = answered(store, tokenizer, question, reply, author=name)
    store.add_feedback(Feedback(turn.id, name, FeedbackKind.CORRECTION, signal=name[:16], text=wanted))
    export(store, place / "out.jsonl", "hash", PrivacyConfig())
    found = read_recording(place / "out.jsonl")
    ((_, messages, (again,), (said,)),) = found.dialogues
    assert [message.text for message in messages] == [question, reply]
    assert (again.text, again.asker_id, again.completion_ids) == (reply, name, turn.completion_ids)
    assert (said.text, said.user_id, said.signal) == (wanted, name, name[:16])
    assert not found.dropped


def test_an_export_reads_back_with_ids_and_feedback(tmp_path, store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    given = react(store, turn, approves=True)
    store.add_feedback(Feedback(turn.id, given.user_id, given.kind, given.signal, retracts=True))
    store.add_feedback(Feedback(turn.id, "ann", FeedbackKind.CORRECTION, text="Hi!"))
    written = export(store, tmp_path / "out", "hash", PrivacyConfig())
    assert written == {"conversations": 1, "messages": 2, "turns": 1, "feedback": 3}
    found = read_recording(tmp_path / "out")
    ((_, messages, (again,), feedback),) = found.dialogues
    assert found.tokenizer_sha256 == "hash"
    assert (again.prompt_ids, again.completion_ids, again.logprobs) == (turn.prompt_ids, turn.completion_ids, turn.logprobs)
    assert [message.text for message in messages] == ["hello", "Hey there!"]
    assert sorted((one.kind, one.retracts) for one in feedback) == sorted(
        (one.kind, one.retracts) for one in store.read_feedback_on([turn.id])[turn.id]
    )
    found.drop_token_ids()
    assert found.dialogues[0][2][0].completion_ids is None


def test_answers_of_a_former_model_are_exported_to_be_tokenized_anew_and_all_of_them_teach(
    tmp_path, store, registry, tokenizer, demo_model
):
    other = tmp_path / "other"
    shutil.copytree(demo_model, other)
    tokenizer.hf.train_new_from_iterator([f"hello there {number}" for number in range(99)], 300).save_pretrained(other)
    another = ChatTokenizer(str(other))
    assert another.completion_ids("Hey there!") != tokenizer.completion_ids("Hey there!"), "two tokenizers"
    former = answered(store, tokenizer, "hello", "Hey there!")
    newer = answered(store, another, "hi", "Hey there!", policy_version=registry.set_base("/models/another").name)
    for turn in (former, newer):
        react(store, turn, approves=True)
    export(store, tmp_path / "out", "hash", PrivacyConfig())
    found = read_recording(tmp_path / "out")
    ids = {turn.policy_version: turn.completion_ids for _, _, turns, _ in found.dialogues for turn in turns}
    assert ids == {former.policy_version: None, newer.policy_version: newer.completion_ids}
    store.add_dialogues(found.dialogues)
    read = ReplayBuffer(store, another, load()).snapshot(found.space)
    assert not read.dropped
    assert {one.completion_ids for one in read.rated} == {newer.completion_ids}, (
        "the same words, in the ids of one tokenizer"
    )


def test_what_an_answer_was_shown_and_replaced_is_read_back(tmp_path, store, tokenizer):
    place = store.open_conversation(Conversation("test", channel=new_id()))
    first = answered(store, tokenizer, "hello", "Hey!", place=place)
    shown = {first.message_id: None, first.reply_id: 0.5}
    second = answered(store, tokenizer, "again", "Hi!", place=place, replaces=first.id, shown=shown)
    export(store, tmp_path / "out", "", PrivacyConfig())
    ((_, messages, turns, _),) = read_recording(tmp_path / "out").dialogues
    again = next(turn for turn in turns if turn.text == second.text)
    before = next(turn for turn in turns if turn.text == first.text)
    assert again.replaces == before.id
    texts = {message.id: message.text for message in messages}
    assert {texts[message]: score for message, score in again.shown.items()} == {"hello": None, "Hey!": 0.5}


def test_an_export_reads_back_how_an_answer_was_chosen(tmp_path, store, tokenizer):
    candidates = [Candidate(text="Hi"), Candidate(text="Hey!", mean_logprob=-0.5, chance=0.7, features={"length": 4.0})]
    chosen = Selection(head="head-1", chosen=1, candidates=candidates, moved={"length": 0.4})
    answered(store, tokenizer, "hello", "Hey!", selection=chosen)
    answered(store, tokenizer, "hello", "Hey!")
    export(store, tmp_path / "out", "", PrivacyConfig())
    turns = [turn for _, _, (turn,), _ in read_recording(tmp_path / "out").dialogues]
    assert [turn.selection for turn in turns] in ([chosen, None], [None, chosen])


def test_an_export_from_before_selections_is_read(tmp_path, store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    header, line = _exported(store, tmp_path, PrivacyConfig()).splitlines()
    row = json.loads(line)
    assert "selection" in row["turns"][0]
    del row["turns"][0]["selection"]
    (tmp_path / "old").write_text(f"{header}\n{json.dumps(row)}\n", encoding="utf-8")
    ((_, _, (again,), _),) = read_recording(tmp_path / "old").dialogues
    assert (again.text, again.selection) == (turn.text, None)


def test_who_does_not_consent_is_in_no_export(tmp_path, store, database, tokenizer):
    privacy = PrivacyConfig()
    place = store.open_conversation(Conversation("test", channel=new_id()))
    mine = answered(store, tokenizer, "my secret", "Your secret is safe.", author="ann", place=place)
    theirs = answered(store, tokenizer, "hello", "Hey!", author="bob", place=place)
    told = answered(store, tokenizer, "and?", "Ann told me.", author="bob", shown={mine.message_id: 0.9})  # elsewhere
    for turn in (mine, theirs, told):
        react(store, turn, approves=True, user="bob")
    assert "secret" in _exported(store, tmp_path, privacy)  # the control
    Users(database, privacy).record_consent("test", "ann", False)
    text = _exported(store, tmp_path, privacy)
    assert "secret" not in text
    assert "Ann told me" not in text
    assert "Hey!" in text
    assert read_recording(tmp_path / "out").count_feedback(FeedbackKind.APPROVAL) == 1


def _exported(store, tmp_path, privacy) -> str:
    export(store, tmp_path / "out", "", privacy)
    return (tmp_path / "out").read_text(encoding="utf-8")


ODD = [
    (lambda row: row | {"turns": [row["turns"][0] | {"prompt_ids": ["x"]}]}, "wrong kind in 'turns.prompt_ids'"),
    (lambda row: row | {"turns": [row["turns"][0] | {"logprobs": [float("nan")]}]}, "wrong kind in 'turns.logprobs'"),
    (
        lambda row: row | {"turns": [row["turns"][0] | {"sampling": {"temperature": "x"}}]},
        "wrong kind in 'turns.sampling.temperature'",
    ),
    (lambda row: row | {"turns": [row["turns"][0] | {"selection": "best"}]}, "wrong kind in 'turns.selection'"),
    (
        lambda row: row | {"turns": [row["turns"][0] | {"selection": {"candidates": [{"text": 1}]}}]},
        "wrong kind in 'turns.selection.candidates.text'",
    ),
    (lambda row: row | {"turns": [row["turns"][0] | {"selection": {"chosen": 2}}]}, "wrong kind in 'turns.selection'"),
    (lambda row: row | {"turns": [row["turns"][0] | {"message_id": "missing"}]}, "an answer without its messages"),
    (lambda row: row | {"turns": row["turns"] * 2}, "a duplicate answer id"),
    (lambda row: row | {"turns": [*row["turns"], row["turns"][0] | {"id": "other"}]}, "a duplicate answer id"),
    (lambda row: row | {"messages": row["messages"] * 2}, "a duplicate message id"),
    (lambda row: row | {"feedback": [row["feedback"][0] | {"turn_id": "missing"}]}, "feedback without its answer"),
    (lambda row: row | {"feedback": [row["feedback"][0] | {"kind": "love"}]}, "wrong kind in 'feedback.kind'"),
    (lambda row: {key: value for key, value in row.items() if key != "messages"}, "has no 'messages'"),
    (lambda row: row, "a duplicate conversation id"),
]


@pytest.mark.parametrize(("change", "reason"), ODD)
def test_an_odd_line_of_an_export_is_left_out_and_the_rest_is_stored(tmp_path, store, tokenizer, change, reason):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    react(store, turn, approves=True)
    export(store, tmp_path / "out", "", PrivacyConfig())
    header, line = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    odd = json.dumps(change(json.loads(line)))
    (tmp_path / "odd").write_text(f"{header}\n{line}\n{odd}\n", encoding="utf-8")
    found = read_recording(tmp_path / "odd")
    assert found.dropped.total() == 1
    assert reason in next(iter(found.dropped))
    assert found.lines()[-1].startswith("left out: line 3 has ")
    store.add_dialogues(found.dialogues)
    assert store.count_rows()["turns"] == 2


def test_an_export_of_a_newer_kibitz_is_not_guessed_at(tmp_path):
    (tmp_path / "out").write_text('{"kibitz-export": 2}\n')
    with pytest.raises(DataError, match="version 2; this kibitz reads version 1"):
        read_recording(tmp_path / "out")


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_no_half(tmp_path, store, tokenizer):
    answered(store, tokenizer, "hello", "Hey there!")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"out: cannot be written \(it is a directory\)"):
        export(store, tmp_path / "out", "", PrivacyConfig())
    assert [file.name for file in tmp_path.iterdir() if "unfinished" in file.name] == []


def test_a_config_with_a_bom_is_read(tmp_path):
    (tmp_path / "config.toml").write_text("seed = 7\n", encoding="utf-8-sig")
    assert load(tmp_path / "config.toml").seed == 7
