"""Recorded conversations: which files are read, how their ratings are understood, and what is counted as left out."""

import bz2
import gzip
import json
import lzma
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from bot.config import ReactionsConfig
from bot.errors import ConfigError, DataError
from bot.types import FeedbackKind
from learning.data.replay_buffer import ReplayBuffer
from learning.data.selection import cap_people
from learning.importers.formats import read_recording
from learning.importers.pairs import read_pairs

OASST = ROOT.parent / "shared" / "data" / "oasst-reactions.trees.jsonl"
QUESTION = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "Hi!"}
WORSE = {"role": "assistant", "content": "Go away"}
RATED = {"messages": [QUESTION, ANSWER], "rating": True}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(tmp_path: Path, *rows: object):
    return read_recording(write(tmp_path / "f.jsonl", *rows))


def opinions(found) -> tuple[int, int]:
    return found.count_feedback(FeedbackKind.APPROVAL), found.count_feedback(FeedbackKind.DISAPPROVAL)


def chats(found) -> list[list[tuple[str, str]]]:
    """Every answer with the messages before it."""
    result = []
    for _, messages, turns, _ in found.dialogues:
        said = {message.id: message for message in messages}
        for turn in turns:
            chain, at = [], turn.reply_id
            while at is not None:
                chain.append((said[at].role.value, said[at].text))
                at = said[at].reply_to
            result.append(chain[::-1])
    return result


def tree(**emojis: int) -> dict:
    reply = {"message_id": "a", "role": "assistant", "text": "Hi!", "emojis": emojis, "rank": 0, "replies": []}
    prompt = {"message_id": "p", "role": "prompter", "text": "hello", "emojis": {"+1": 2}, "replies": [reply]}
    return {"message_tree_id": "t", "prompt": prompt}


@pytest.mark.skipif(not OASST.exists(), reason=f"the OpenAssistant trees are not at {OASST}")
def test_the_trees_of_real_people_are_read_without_silent_loss():
    found = read_recording(OASST)
    assert found.format == "oasst"
    assert len(found.dialogues) == 68
    assert found.answer_count == 469
    assert opinions(found) == (611, 220)
    emojis: Counter[str] = Counter()

    def count(node: dict) -> None:
        emojis.update(node.get("emojis") or {})
        for reply in node["replies"]:
            count(reply)

    for line in OASST.read_text().splitlines():
        count(json.loads(line)["prompt"])
    assert emojis.total() == 611 + 220 + found.dropped.total()


def test_a_tree_gives_reactions_and_a_rank_and_counts_what_is_no_reaction(tmp_path):
    found = read_rows(tmp_path, tree(**{"+1": 3, "-1": 1, "red_flag": 2}))
    counts = {kind: found.count_feedback(kind) for kind in FeedbackKind}
    assert counts == dict.fromkeys(FeedbackKind, 0) | {"approval": 3, "disapproval": 1, "rank": 1}
    assert found.dropped == {"+1 on a user's message": 2, "red_flag (an action of the tool, not a reaction)": 2}


def test_people_whom_a_file_counts_and_does_not_name_are_others_at_each_answer(tmp_path):
    """As one person, who likes whatever is liked, they would be held back, and say nothing of a candidate."""
    rows = [tree(**{"+1": 2, "-1": 1}) | {"message_tree_id": str(number)} for number in range(30)]
    found = read_rows(tmp_path, *rows)
    given = [row for *_, feedback in found.dialogues for row in feedback if row.kind != FeedbackKind.RANK]
    assert len({row.user_id for row in given}) == len(given) == 90
    of_turn = defaultdict(list)
    for row in given:
        of_turn[row.turn_id].append(row.user_id)
    weights = cap_people([tuple(people) for people in of_turn.values()], np.ones(30), cap=0.25)
    assert (weights == 1).all()


def test_importing_a_file_twice_stores_it_once(tmp_path, store):
    path = write(tmp_path / "f", tree(**{"+1": 3}))
    store.add_dialogues(read_recording(path).dialogues)
    before = store.count_rows()
    store.add_dialogues(read_recording(path).dialogues)
    assert store.count_rows() == before == {"conversations": 1, "messages": 2, "turns": 1, "feedback": 4}


def test_rated_messages_are_read(tmp_path, store, tokenizer):
    said = [{"role": "system", "content": "Be kind."}, QUESTION]
    rows = [
        {"messages": [*said, ANSWER], "rating": True},
        {"messages": [*said, ANSWER | {"rating": -0.5}]},
        {"messages": [*said, ANSWER], "rating": "down"},
        {"messages": [*said, ANSWER]},
    ]
    found = read_rows(tmp_path, *rows)
    assert opinions(found) == (1, 2)
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
    ([{"hello": 1}], "line 1 has no known format"),
    ([5], "line 1 is not a JSON object"),
    ([{"messages": [{"role": "robot", "content": "x"}]}], "line 1 has the unknown role 'robot'"),
    ([{"messages": [{"content": "x"}]}], "line 1 has no 'role'"),
    ([{"messages": [{"role": "user"}]}], "line 1: message without content"),
    ([{"messages": [QUESTION], "rating": True}], "line 1 has a rating but no answer"),
    ([{"messages": 5}], "line 1 has a value of the wrong kind in 'messages'"),
    ([tree() | {"prompt": tree()["prompt"] | {"role": "admin"}}], "role 'admin'"),
    ([{"prompt": "x", "completion": 7}], "wrong kind in 'completion"),
    ([{"prompt": "x", "chosen": "same", "rejected": "same"}], "two identical answers"),
    (["[" * 100_000], "line 1 is not JSON (it is nested too deeply)"),
    (["1" * 5000], "line 1 is not JSON"),
    (["[\n {},\n {]\n"], "line 3 is not JSON"),
    (["{\n\n\n"], "line 1 is not JSON"),
    ([], "is empty"),
]


@pytest.mark.parametrize(("rows", "wanted"), MISTAKES)
def test_a_file_of_which_nothing_can_be_read_is_one_line_that_names_the_place(tmp_path, rows, wanted):
    with pytest.raises(DataError) as error:
        read_rows(tmp_path, *rows)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", [rows[0] for rows, _ in MISTAKES if rows])
def test_one_odd_row_refuses_no_file_and_is_counted_with_its_place(tmp_path, row):
    text = row.replace("\n", "") if isinstance(row, str) else row
    found = read_rows(tmp_path, RATED, text, RATED)
    assert opinions(found) == (2, 0)
    assert found.dropped.total() >= 1
    assert all(place.startswith("line 2") for place, _ in found.first_dropped.values()), found.first_dropped


def test_a_format_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    path = write(tmp_path / "f", RATED)
    with pytest.raises(ConfigError, match="'yaml'; it must be auto or one of kibitz, oasst, open-webui, discord, dpo"):
        read_recording(path, "yaml")
    assert opinions(read_recording(path, "openai")) == (1, 0)
    with pytest.raises(DataError, match="line 1 has no 'message_tree_id'"):
        read_recording(path, "oasst")


ENCODINGS = {
    "UTF-8 with a BOM": lambda text: text.encode("utf-8-sig"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a BOM": lambda text: text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "bzip2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "twice": lambda text: gzip.compress(gzip.compress(text.encode("utf-16"))),
    "Windows' line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "two files joined, with BOMs": lambda text: text.replace("\n", "\n\ufeff").encode(),
    "an array": lambda text: f"[{','.join(text.splitlines())}]".encode(),
    "a pretty array": lambda text: json.dumps([json.loads(line) for line in text.splitlines()], indent=2).encode(),
    "pretty objects": lambda text: "\n".join(json.dumps(json.loads(one), indent=2) for one in text.splitlines()).encode(),
    "arrays in lines": lambda text: "\n".join(f"[{line}]" for line in text.splitlines()).encode(),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS.keys())
def test_a_file_is_read_however_it_is_written_down(tmp_path, encode):
    rows = [RATED, {"messages": [{"role": "user", "content": "wie geht’s? 👋"}, ANSWER], "rating": False}]
    path = tmp_path / "f"
    path.write_bytes(encode("\n".join(json.dumps(row, ensure_ascii=False) for row in rows)))
    found = read_recording(path)
    assert opinions(found) == (1, 1)
    assert [chat[0][1] for chat in chats(found)] == ["hello", "wie geht’s? 👋"]
    assert not found.dropped


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e", "\t", "\x7f"])
def test_what_is_no_line_end_in_json_ends_no_line(tmp_path, mark):
    row = json.dumps({"messages": [{"role": "user", "content": f"one{mark}two"}, ANSWER], "rating": 1}, ensure_ascii=False)
    found = read_rows(tmp_path, row, "{", row.replace("\\t", mark))  # with an odd line the others are read one by one
    assert [chat[0][1] for chat in chats(found)] == [f"one{mark}two"] * 2


def test_what_no_database_keeps_is_replaced_and_counted(tmp_path, store):
    said = (
        r'{"messages": [{"role": "user", "content": "a\u0000b\ud800c\ud83d\ude00"}, {"role": "assistant", "content": ""}]}'
    )
    (tmp_path / "f").write_bytes(said.encode() + b"\n" + json.dumps(RATED).encode().replace(b"hello", b"hell\xf6"))
    found = read_recording(tmp_path / "f")
    assert [chat[0][1] for chat in chats(found)] == ["a\ufffdb\ufffdc😀", "hell\ufffd"]
    assert found.dropped["row with invalid characters, which were replaced"] == 2
    store.add_dialogues(found.dialogues)
    assert store.count_rows()["turns"] == 2


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (gzip.compress(json.dumps(RATED).encode())[:-9], "cannot be unpacked"),
        (b"PK\x03\x04broken", "cannot be unpacked"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not"),
        (b"<!DOCTYPE html><html></html>", "is not JSON"),
        (b"\xff\xfe{", "is not UTF-16"),
        (b"", "is empty"),
    ],
    ids=["cut gzip", "broken zip", "picture", "page", "cut UTF-16", "nothing"],
)
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, raw, wanted):
    (tmp_path / "f").write_bytes(raw)
    with pytest.raises(DataError) as error:
        read_recording(tmp_path / "f")
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_directory_and_an_archive_are_read_whole_and_say_what_is_no_recording(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    write(folder / "a.jsonl", RATED, "{")
    write(folder / "deep" / "b.json", {"prompt": "x", "completion": "y", "label": False})
    write(folder / "deep" / ".hidden" / "c.json", RATED)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(RATED).encode()))
    (folder / "photo.png").write_bytes(b"\x89PNG")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("e.jsonl", json.dumps(RATED))
        archive.writestr("notes.txt", "not read")
    found = read_recording(folder)
    assert found.format == "kto, openai"
    assert opinions(found) == (3, 1)
    assert found.dropped == {"row that is not JSON": 1, "file that has an unsupported suffix": 2}
    assert found.first_dropped["row that is not JSON"][0] == "a.jsonl, line 2"
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    again = read_recording(tmp_path / "all.zip")
    assert (opinions(again), again.dropped) == (opinions(found), found.dropped)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no files"):
        read_recording(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot be read"):
        read_recording(tmp_path / "missing")


SCALES = [  # ratings of one file, what they mean, and how the report says it
    ([True, False], "+-", "yes or no, in words"),
    (["true", "False", "YES", "no"], "+-+-", "yes or no, in words"),
    (["Up", "down", "thumbs_up", "thumbs-down", "👍🏽", "👎", "good", "bad"], "+-+-+-+-", "yes or no, in words"),
    ([0], "-", "0 or 1"),
    ([1, 0, 1], "+-+", "0 or 1"),
    (["0", "1", 1.0], "-++", "0 or 1"),
    ([1, -1], "+-", "-1 to 1"),
    (["+1", "-1", ":+1:"], "+-+", "-1 to 1"),
    ([-0.5, 0, 0.25], "-.+", "-1 to 1"),
    ([0.8, 0.3, 0.5], "+-.", "0 to 1"),
    ([5, 4, 3, 2, 1], "++.--", "1 to 5 stars"),
    (["4 stars", "★★☆☆☆", "⭐⭐⭐⭐⭐", "1/5"], "+-+-", "1 to 5 stars"),
    ([9, 2, 1], "+--", "1 to 10"),
    ([80, 20, 50], "+-.", "0 to 100 percent"),
    (["80%", "20 %", "9/10"], "+-+", "0 to 100 percent (below 50 is a dislike, above it a like); 0 to 10"),
    ([3, -2, 0], "+-.", "-5 to 5"),
]


@pytest.mark.parametrize(("ratings", "wanted", "scale"), SCALES)
def test_a_rating_means_what_it_means_on_the_scale_of_its_file(tmp_path, ratings, wanted, scale):
    found = read_rows(tmp_path, *(RATED | {"rating": rating} for rating in ratings))
    signs = {FeedbackKind.APPROVAL: "+", FeedbackKind.DISAPPROVAL: "-"}
    understood = "".join(signs[given[0].kind] if given else "." for *_, given in found.dialogues)
    assert understood == wanted
    assert found.scale_summary.startswith(scale)
    assert found.dropped.total() == wanted.count(".")


def test_files_beside_each_other_have_scales_of_their_own(tmp_path):
    write(tmp_path / "stars.jsonl", *(RATED | {"rating": rating} for rating in (1, 5)))
    write(tmp_path / "thumbs.jsonl", *(RATED | {"rating": rating} for rating in (1, 0)))
    found = read_recording(tmp_path)
    assert opinions(found) == (2, 2)
    assert "stars.jsonl: 1 to 5 stars" in found.scale_summary
    assert "thumbs.jsonl: 0 or 1" in found.scale_summary


@pytest.mark.parametrize("rating", [250, 10**400, "great", [1], "6 stars", "7/0"])
def test_a_rating_that_means_nothing_is_left_out_and_leaves_the_others_their_scale(tmp_path, rating):
    rows = [RATED | {"rating": one} for one in (1, rating, 0)]
    found = read_rows(tmp_path, *rows)
    assert opinions(found) == (1, 1)
    assert found.dropped == {"rating that is not understood": 1}
    assert found.first_dropped["rating that is not understood"][0] == "line 2"
    assert found.scale_summary.startswith("0 or 1")


def test_messages_are_read_in_openais_and_in_sharegpts_words(tmp_path):
    parts = [{"type": "text", "text": "he"}, {"type": "image_url", "image_url": {}}, {"type": "text", "text": "llo"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "w"}}]}
    rows = [
        {"messages": [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}, ANSWER], "rating": 1},
        {"messages": [QUESTION, call, {"role": "tool", "content": "sunny"}, ANSWER], "rating": 1},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "Hi!"}], "label": "good"},
        {"conversation": [{"from": "System", "value": "be kind"}, QUESTION, ANSWER], "score": 1},
    ]
    found = read_rows(tmp_path, *rows)
    assert found.format == "openai, sharegpt"
    assert opinions(found) == (4, 0)
    asked = [("user", "hello"), ("assistant", "Hi!")]
    assert chats(found) == [[("system", "be kind"), *asked], asked, asked, [("system", "be kind"), *asked]]
    assert found.dropped == {"message part that is not text": 1, "message without content": 1, "tool message": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "chosen": "Hi!", "rejected": "Go away"},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [WORSE]},
        {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},
        {"prompt": "hello", "chosen": [QUESTION, ANSWER], "rejected": [QUESTION, WORSE]},
        {"chosen": "hello Hi!", "rejected": "hello Go away"},
        {"chosen": "\n\nHuman: hello\n\nAssistant: Hi!", "rejected": "\n\nHuman: hello\n\nAssistant: Go away"},
        {"conversations": [QUESTION], "prompt": "hello", "chosen": ANSWER, "rejected": WORSE},
    ],
)
def test_of_a_preference_the_chosen_answer_is_liked_and_the_rejected_one_is_not(tmp_path, row):
    found = read_rows(tmp_path, row)
    assert found.format == "dpo"
    assert chats(found) == [[("user", "hello"), ("assistant", text)] for text in ("Hi!", "Go away")]
    ((_, _, (liked, disliked), given),) = found.dialogues
    assert {one.turn_id: one.kind for one in given} == {
        liked.id: FeedbackKind.APPROVAL,
        disliked.id: FeedbackKind.DISAPPROVAL,
    }
    assert liked.message_id == disliked.message_id


@pytest.mark.parametrize("prompt", ["hello", [QUESTION]])
@pytest.mark.parametrize("completion", ["Hi!", [ANSWER], ANSWER])
def test_rows_of_unpaired_preferences_are_read(tmp_path, prompt, completion):
    rows = [{"prompt": prompt, "completion": completion, "label": label} for label in (True, False, None)]
    found = read_rows(tmp_path, *rows)
    assert found.format == "kto"
    assert chats(found) == [[("user", "hello"), ("assistant", "Hi!")]] * 3
    assert opinions(found) == (1, 1)
    assert found.dropped == {"conversation without a rating": 1}


def test_flat_messages_of_openassistant_are_read_as_their_tree_is(tmp_path):
    question = {"message_id": "p", "parent_id": None, "role": "prompter", "text": "hello", "message_tree_id": "t"}
    answer = {"message_id": "a", "parent_id": "p", "role": "assistant", "text": "Hi!", "rank": "0", "message_tree_id": "t"}
    emojis = {"emojis": {"name": ["+1", "-1"], "count": [3, 1]}}
    lost = answer | {"message_id": "b", "parent_id": "missing"}
    circle = answer | {"message_id": "c", "parent_id": "c"}
    found = read_rows(tmp_path, answer | emojis, question, lost, circle)  # in any order
    assert chats(found) == [[("user", "hello"), ("assistant", "Hi!")]]
    assert opinions(found) == (3, 1)
    assert found.count_feedback(FeedbackKind.RANK) == 1
    assert found.dropped == {"message whose parent is missing": 2}


def test_an_id_that_comes_twice_is_left_out_and_stored_once(tmp_path, store):
    twice = tree()
    twice["prompt"]["replies"].append(twice["prompt"]["replies"][0] | {"text": "Hi again"})
    deleted = {"message_id": "d", "role": "assistant", "text": "x", "deleted": True, "replies": [{"message_id": "e"}]}
    twice["prompt"]["replies"].append(deleted | {"replies": [twice["prompt"]["replies"][0] | {"message_id": "e"}]})
    found = read_rows(tmp_path, twice, tree(), tree() | {"message_tree_id": "other"})
    assert found.dropped["message with a duplicate id"] == 3  # a sibling, and a tree of two
    assert found.dropped["deleted message, with the replies to it"] == 1
    assert len(found.dialogues) == 2
    store.add_dialogues(found.dialogues)
    assert store.count_rows()["turns"] == 2


def test_pairs_are_read_from_messages_and_from_the_cornell_files(tmp_path):
    said = [QUESTION, ANSWER]
    rows = [{"messages": said}, {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "Hi!"}]}]
    assert list(read_pairs(write(tmp_path / "f", *rows))) == [said, said]
    folder = tmp_path / "cornell"
    folder.mkdir()
    lines = [
        "L1 +++$+++ u0 +++$+++ m0 +++$+++ BIANCA +++$+++ Hi.",
        "L2 +++$+++ u2 +++$+++ m0 +++$+++ CAMERON +++$+++ Caf\xe9\x85?",
    ]
    (folder / "movie_lines.txt").write_bytes("\r\n".join(lines).encode("iso-8859-1"))
    (folder / "movie_conversations.txt").write_text("u0 +++$+++ u2 +++$+++ m0 +++$+++ ['L1', 'L2']\n")
    assert list(read_pairs(folder)) == [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Café\x85?"}]]
    with pytest.raises(DataError, match="corpus's folder"):
        list(read_pairs(tmp_path))


def test_reactions_count_as_the_config_says(tmp_path):
    from test_platform_exports import discord_file, discord_message

    question = discord_message("10", "ann", "hello")
    answer = discord_message("11", "kibitz", "Hi!", reply_to="10", reactions={"🦜": ["ann"]})
    path = write(tmp_path / "f.json", discord_file(question, answer))
    assert read_recording(path).dropped["reaction that is not an opinion"] == 1
    assert opinions(read_recording(path, reactions=ReactionsConfig(disapproval=["🦜"]))) == (0, 1)
