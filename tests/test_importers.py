"""Recorded conversations: what is read, what is counted as left out, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import answered, react

from bot.config import PrivacyConfig
from bot.errors import DataError
from bot.types import Feedback, FeedbackKind
from learning.importers import export, pairs, read
from learning.replay_buffer import ReplayBuffer

OASST = Path(__file__).parent.parent.parent / "shared" / "data" / "oasst-reactions.trees.jsonl"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def tree(**emojis: int) -> dict:
    reply = {"message_id": "a", "role": "assistant", "text": "Hi!", "emojis": emojis, "rank": 0, "replies": []}
    prompt = {"message_id": "p", "role": "prompter", "text": "hello", "emojis": {"+1": 2}, "replies": [reply]}
    return {"message_tree_id": "t", "prompt": prompt}


@pytest.mark.skipif(not OASST.exists(), reason=f"the OpenAssistant trees are not at {OASST}")
def test_the_trees_of_real_people_are_read_without_silent_loss():
    found = read(OASST)
    assert found.format == "oasst"
    assert len(found.dialogues) == 68
    assert found.assistant_messages == 469
    assert found.count(FeedbackKind.APPROVAL) == 611
    assert found.count(FeedbackKind.DISAPPROVAL) == 220
    emojis: Counter[str] = Counter()

    def count(node: dict) -> None:
        emojis.update(node.get("emojis") or {})
        for reply in node["replies"]:
            count(reply)

    for line in OASST.read_text().splitlines():
        count(json.loads(line)["prompt"])
    assert emojis.total() == 611 + 220 + found.dropped.total()


def test_a_tree_gives_reactions_and_a_rank_and_counts_what_is_no_reaction(tmp_path):
    found = read(write(tmp_path / "f", tree(**{"+1": 3, "-1": 1, "red_flag": 2})))
    counts = {kind: found.count(kind) for kind in FeedbackKind}
    assert counts == dict.fromkeys(FeedbackKind, 0) | {"approval": 3, "disapproval": 1, "rank": 1}
    assert found.dropped == {"+1 on a user's message": 2, "red_flag which is a tool's action, no reaction": 2}


def test_importing_a_file_twice_stores_it_once(tmp_path, store):
    path = write(tmp_path / "f", tree(**{"+1": 3}))
    store.add_dialogues(read(path).dialogues)
    before = store.counts()
    store.add_dialogues(read(path).dialogues)
    assert store.counts() == before == {"conversations": 1, "messages": 2, "turns": 1, "feedback": 4}


def test_rated_messages_are_read(tmp_path, store, tokenizer):
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    reply = {"role": "assistant", "content": "Hi!"}
    rows = [
        {"messages": [*said, reply], "rating": True},
        {"messages": [*said, reply | {"rating": -0.5}]},
        {"messages": [*said, reply], "rating": "down"},
        {"messages": [*said, reply]},
    ]
    found = read(write(tmp_path / "f", *rows))
    assert (found.count(FeedbackKind.APPROVAL), found.count(FeedbackKind.DISAPPROVAL)) == (1, 2)
    assert found.dropped == {"conversation without a rating": 1}
    store.add_dialogues(found.dialogues)
    from bot.config import load

    snapshot = ReplayBuffer(store, tokenizer, load()).snapshot(found.space)
    experience = (snapshot.training + snapshot.held_out)[0]
    assert list(experience.prompt_ids) == tokenizer.prompt_ids(said)
    assert experience.logprobs is None
    assert snapshot.without_logprobs == 3


MISTAKES = [
    (["{"], "line 1 is not JSON"),
    ([tree(), "[1]"], "line 2 is no JSON object"),
    ([{"hello": 1}], "no known format"),
    ([{"messages": [{"role": "robot", "content": "x"}]}], "line 1: role 'robot' is not known"),
    ([{"messages": [{"role": "user"}]}], "line 1 has no 'content'"),
    ([{"messages": [{"role": "user", "content": "x"}], "rating": True}], "no answer"),
    ([{"messages": 5}], "wrong kind"),
    ([tree() | {"prompt": tree()["prompt"] | {"role": "admin"}}], "role 'admin'"),
    ([tree(), {"messages": []}], "line 2 has no 'message_tree_id'"),
    ([], "is empty"),
]


@pytest.mark.parametrize(("rows", "wanted"), MISTAKES)
def test_a_broken_file_is_one_line_that_names_the_place(tmp_path, rows, wanted):
    with pytest.raises(DataError) as error:
        read(write(tmp_path / "f", *rows))
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rating", [2, "great", None, [1]])
def test_a_rating_out_of_range_is_refused(tmp_path, rating):
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="rating has value"):
        read(write(tmp_path / "f", {"messages": said, "rating": rating}))


def test_an_export_reads_back_with_ids_and_feedback(tmp_path, store, tokenizer):
    turn = answered(store, tokenizer, "hello", "Hey there!")
    given = react(store, turn, approves=True)
    store.add_feedback(Feedback(turn.id, given.user_id, given.kind, given.signal, retracts=True))
    store.add_feedback(Feedback(turn.id, "ann", FeedbackKind.CORRECTION, text="Hi!"))
    written = export(store, tmp_path / "out", "hash", PrivacyConfig())
    assert written == {"conversations": 1, "messages": 2, "turns": 1, "feedback": 3}
    found = read(tmp_path / "out")
    ((_, messages, (again,), feedback),) = found.dialogues
    assert found.tokenizer_sha256 == "hash"
    assert (again.prompt_ids, again.completion_ids, again.logprobs) == (turn.prompt_ids, turn.completion_ids, turn.logprobs)
    assert [message.text for message in messages] == ["hello", "Hey there!"]
    assert sorted((one.kind, one.retracts) for one in feedback) == sorted(
        (one.kind, one.retracts) for one in store.feedback_of([turn.id])[turn.id]
    )
    found.forget_ids()
    assert found.dialogues[0][2][0].completion_ids is None


def test_pairs_are_read_from_messages_and_from_the_cornell_files(tmp_path):
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert list(pairs(write(tmp_path / "f", {"messages": said}))) == [said]
    folder = tmp_path / "cornell"
    folder.mkdir()
    lines = [
        "L1 +++$+++ u0 +++$+++ m0 +++$+++ BIANCA +++$+++ Hi.",
        "L2 +++$+++ u2 +++$+++ m0 +++$+++ CAMERON +++$+++ Caf\xe9?",
    ]
    (folder / "movie_lines.txt").write_bytes("\n".join(lines).encode("iso-8859-1"))
    (folder / "movie_conversations.txt").write_text("u0 +++$+++ u2 +++$+++ m0 +++$+++ ['L1', 'L2']\n")
    assert list(pairs(folder)) == [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Café?"}]]
    with pytest.raises(DataError, match="corpus's folder"):
        list(pairs(tmp_path))
