"""What people export from Discord, Slack and Open WebUI: which answers are found in it, and who liked them."""

import json
import zipfile
from pathlib import Path

import pytest
from test_importers import chats, opinions

from bot.errors import DataError
from bot.types import FeedbackKind
from learning.importers.formats import read_recording

BOTS = {"kibitz", "newsbot"}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def discord_user(name: str) -> dict:
    return {"id": f"id of {name}", "name": name, "nickname": name.title(), "isBot": name in BOTS}


def discord_message(id: str, author: str, text: str, reply_to: str = "", reactions: dict | None = None, **details) -> dict:
    users = {emoji: [discord_user(name) for name in names] for emoji, names in (reactions or {}).items()}
    return {
        "id": id,
        "type": "Reply" if reply_to else "Default",
        "timestamp": f"2026-01-01T00:{int(id) // 60:02}:{int(id) % 60:02}+00:00",
        "content": text,
        "author": discord_user(author),
        "mentions": [discord_user(name) for name in BOTS if f"@{name.title()}" in text],
        "reactions": [
            {"emoji": {"id": "", "name": emoji, "code": ""}, "count": len(found), "users": found}
            for emoji, found in users.items()
        ],
        **({"reference": {"messageId": reply_to, "channelId": "2", "guildId": "1"}} if reply_to else {}),
        **details,
    }


def discord_file(*messages: dict, channel: str = "2", type: str = "GuildTextChat") -> dict:
    return {
        "guild": {"id": "1", "name": "guild"},
        "channel": {"id": channel, "type": type, "name": "general"},
        "messages": list(messages),
        "messageCount": len(messages),
    }


def said_of(found, text: str) -> list[tuple[str, FeedbackKind]]:
    """Who said what of the answer with this text."""
    [turn] = [turn for _, _, turns, _ in found.dialogues for turn in turns if turn.text == text]
    return [(one.user_id, one.kind) for *_, given in found.dialogues for one in given if one.turn_id == turn.id]


def test_of_a_discord_channel_the_answers_are_read_and_the_talk_of_others_is_not(tmp_path):
    found = read_recording(
        write(
            tmp_path / "f.json",
            discord_file(
                discord_message("1", "ann", "has anybody seen my keys?"),
                discord_message("2", "ann", "@Kibitz hello"),
                discord_message("3", "bob", "under the sofa"),
                discord_message("4", "kibitz", "Hi!", "2", {"👍": ["ann", "bob", "kibitz"], "🙈": ["bob"]}),
                discord_message("5", "kibitz", "How are you?", reactions={"👎": ["cat"]}),  # a long answer's second part
                discord_message("6", "ann", "fine", "5", {"👍": ["bob"]}),
                discord_message("7", "kibitz", "Good.", "6"),
                discord_message("8", "bob", "@Kibitz and me?"),
                discord_message("9", "newsbot", "Breaking: rain"),
                discord_message("10", "kibitz", "You too."),  # without a reference: of who mentioned it last
                discord_message("11", "kibitz", "", "8"),
                discord_message("12", "cat", "cat joined", type="GuildMemberJoin"),
                {"id": "13"},
                discord_message("2", "ann", "again"),
            ),
        )
    )
    asked = [("user", "hello"), ("assistant", "Hi!\nHow are you?")]
    assert chats(found) == [
        asked,
        [*asked, ("user", "fine"), ("assistant", "Good.")],
        [("user", "and me?"), ("assistant", "You too.")],
    ]
    assert len(found.dialogues) == 2
    assert said_of(found, "Hi!\nHow are you?") == [
        ("id of ann", FeedbackKind.APPROVAL),
        ("id of bob", FeedbackKind.APPROVAL),
        ("id of cat", FeedbackKind.DISAPPROVAL),
    ]
    assert {turn.asker_id for _, _, turns, _ in found.dialogues for turn in turns} == {"id of ann", "id of bob"}
    assert found.dropped == {
        "reaction of a bot": 1,
        "reaction that is not an opinion": 1,
        "reaction to a message that is not an answer": 1,
        "message without text": 1,
        "message that is a platform notice": 1,
        "message that has no 'timestamp'": 1,
        "message with a duplicate id": 1,
        "message outside of exchanges with a bot": 3,
    }


def test_messages_that_reply_to_each_other_end_no_import(tmp_path):
    said = [
        discord_message("1", "ann", "hello", reply_to="2"),
        discord_message("2", "kibitz", "Hi!", reply_to="1"),
        discord_message("3", "ann", "me", reply_to="3"),
        discord_message("4", "kibitz", "You!", reply_to="3"),
    ]
    found = read_recording(write(tmp_path / "f.json", discord_file(*said)))
    assert chats(found) == [[("user", "hello"), ("assistant", "Hi!")], [("user", "me"), ("assistant", "You!")]]


def test_in_a_thread_and_in_direct_messages_each_message_answers_the_one_before(tmp_path):
    said = [
        discord_message("1", "ann", "hello"),
        discord_message("2", "kibitz", "Hi!", reactions={"👍": ["ann"]}),
        discord_message("3", "ann", "and now?"),
        discord_message("4", "kibitz", "Now we talk."),
    ]
    late = [message | {"id": f"9{message['id']}", "timestamp": "2026-01-02T00:00:00+00:00"} for message in said[:2]]
    whole = [("user", "hello"), ("assistant", "Hi!"), ("user", "and now?"), ("assistant", "Now we talk.")]
    for kind, conversations in (("GuildPublicThread", 1), ("DirectTextChat", 2), ("GuildTextChat", 0)):
        path = write(tmp_path / "f.json", discord_file(*said, *late, type=kind))
        if not conversations:
            with pytest.raises(DataError, match="outside of exchanges with a bot"):
                read_recording(path)
            continue
        found = read_recording(path)
        assert chats(found)[:2] == [whole[:2], whole]
        assert len(found.dialogues) == conversations
        assert opinions(found) == (2, 0)


def test_a_channel_in_several_files_is_one_and_reactions_without_names_count(tmp_path):
    nameless = {"emoji": {"id": "7", "name": "👎"}, "count": 2}
    answer = discord_message("2", "kibitz", "Hi!", reply_to="1") | {"reactions": [nameless]}
    folder = tmp_path / "exports"
    folder.mkdir()
    write(folder / "general [part 1].json", discord_file(discord_message("1", "ann", "hello")))
    write(folder / "general [part 2].json", discord_file(answer))
    found = read_recording(folder)
    assert (found.format, chats(found)) == ("discord", [[("user", "hello"), ("assistant", "Hi!")]])
    assert opinions(found) == (0, 2)


def slack_message(ts: str, user: str, text: str, thread: str = "", reactions: dict | None = None, **details) -> dict:
    given = [{"name": name, "users": users, "count": len(users)} for name, users in (reactions or {}).items()]
    return {
        "type": "message",
        "user": user,
        "text": text,
        "ts": ts,
        **({"bot_id": "B1"} if user == "UBOT" else {}),
        **({"thread_ts": thread} if thread else {}),
        **({"reactions": given} if given else {}),
        **details,
    }


MARKUP = "<@UBOT> a &lt;b&gt; <@U1> <#C1|general> <https://x.org|x>"
SLACK = {
    "users.json": [
        {"id": "U1", "name": "ann", "is_bot": False, "profile": {"display_name": "Ann"}},
        {"id": "UBOT", "name": "kibitz", "is_bot": True},
    ],
    "channels.json": [{"id": "C1", "name": "general"}],
    "dms.json": [{"id": "D1", "members": ["U1", "UBOT"]}],
    "integration_logs.json": [{"user_id": "U1", "change_type": "added"}],
    "general/2026-01-01.json": [
        slack_message("1767225600.000100", "U1", MARKUP, "1767225600.000100"),
        slack_message("1767225601.000100", "UBOT", "Hi!", "1767225600.000100", {"+1::skin-tone-4": ["U1"], "eyes": ["U1"]}),
        slack_message("1767225602.000100", "U1", "<@U1> joined", subtype="channel_join"),
        slack_message("1767225603.000100", "U1", "just talking"),
    ],
    "general/2026-01-02.json": [  # the thread goes on the next day
        slack_message("1767312000.000100", "U1", "thanks", "1767225600.000100"),
        slack_message("1767312001.000100", "UBOT", "Any time.", "1767225600.000100", {"-1": ["U1", "UBOT"]}),
        {"type": "message", "text": "odd"},
    ],
    "D1/2026-01-01.json": [
        slack_message("1767225600.000200", "U1", "psst"),
        slack_message("1767225601.000200", "UBOT", "Yes?", "", {"heart": ["U1"]}),
    ],
}


@pytest.mark.parametrize("shape", ["zip", "folder", "zip in a folder"])
def test_a_slack_export_is_read_with_its_threads_names_and_reactions(tmp_path, shape):
    place = tmp_path / "export"
    if shape == "folder":
        for name, value in SLACK.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            write(place / name, value)
    else:
        place = tmp_path / "in" / "export.zip"
        place.parent.mkdir()
        with zipfile.ZipFile(place, "w") as archive:
            for name, value in SLACK.items():
                archive.writestr(name, json.dumps(value))
        place = place if shape == "zip" else place.parent
    found = read_recording(place)
    assert found.format == "slack"
    asked = [("user", "a <b> @Ann #general x"), ("assistant", "Hi!")]
    assert sorted(chats(found)) == sorted(
        [asked, [*asked, ("user", "thanks"), ("assistant", "Any time.")], [("user", "psst"), ("assistant", "Yes?")]]
    )
    assert said_of(found, "Hi!") == [("U1", FeedbackKind.APPROVAL)]
    assert said_of(found, "Any time.") == [("U1", FeedbackKind.DISAPPROVAL)]
    assert said_of(found, "Yes?") == [("U1", FeedbackKind.APPROVAL)]
    assert found.dropped == {
        "reaction that is not an opinion": 1,
        "reaction of a bot": 1,
        "message that is a platform notice": 1,
        "row that has no known format": 1,
        "message outside of exchanges with a bot": 1,
    }


def webui_message(id: str, parent: str | None, text: str, **details) -> dict:
    role = "assistant" if id.startswith("a") else "user"
    return {"id": id, "parentId": parent, "childrenIds": [], "role": role, "content": text, **details}


def webui_chat(*messages: dict, id: str = "c1") -> dict:
    tree = {"currentId": messages[-1]["id"], "messages": {message["id"]: message for message in messages}}
    return {"id": id, "user_id": "u1", "title": "x", "chat": {"title": "x", "history": tree, "messages": list(messages)}}


def webui_feedback(rating: object, message: str = "a1", user: str = "u2", snapshot: dict | None = None, **data) -> dict:
    return {
        "id": "f1",
        "user_id": user,
        "type": "rating",
        "data": {"rating": rating, "model_id": "kibitz", "sibling_model_ids": None, "details": {"rating": 9}, **data},
        "meta": {"message_id": message, "chat_id": "c1"},
        "snapshot": None if snapshot is None else {"chat": snapshot},
    }


THOUGHT = '<details type="reasoning" done="true">\n<summary>Thought</summary>\n> hm\n</details>\nHi!'
CHAT = webui_chat(
    webui_message("u1", None, "hello"),
    webui_message("a1", "u1", THOUGHT, annotation={"rating": 1, "comment": "nice"}),
    webui_message("a2", "u1", "Go away", annotation={"rating": -1}),  # regenerated
    webui_message("u2", "a1", "bye"),
    webui_message("a3", "u2", "Bye!", annotation={"rating": "much"}),
)


def test_an_open_webui_chat_is_read_as_a_tree_with_its_ratings_and_without_thoughts(tmp_path):
    found = read_recording(
        write(tmp_path / "f.json", [CHAT, webui_chat(webui_message("u1", None, "x"), id="c2"), {"chat": 5}])
    )
    assert found.format == "open-webui"
    asked = [("user", "hello"), ("assistant", "Hi!")]
    assert sorted(chats(found)) == sorted(
        [asked, [("user", "hello"), ("assistant", "Go away")], [*asked, ("user", "bye"), ("assistant", "Bye!")]]
    )
    assert said_of(found, "Hi!") == [("u1", FeedbackKind.COMMENT), ("u1", FeedbackKind.APPROVAL)]
    assert said_of(found, "Go away") == [("u1", FeedbackKind.DISAPPROVAL)]
    assert found.dropped == {"rating that is not understood": 1, "row that has a value of the wrong kind in 'chat'": 1}


def test_open_webui_feedback_brings_its_chat_and_counts_once_beside_it(tmp_path):
    old = {"title": "x", "messages": [webui_message("u1", None, "hello"), webui_message("a1", None, "Hi!")]}  # a bare chat
    for name, rows in {
        "both.json": [webui_feedback(-1, snapshot=CHAT, comment="no"), webui_feedback("1", user="u1"), CHAT],
        "feedback.json": [webui_feedback(-1, snapshot=old), webui_feedback(1, user="u1")],
    }.items():
        found = read_recording(write(tmp_path / name, rows))
        assert len(found.dialogues) == 1
        opinions_of = [one for one in said_of(found, "Hi!") if one[1] != FeedbackKind.COMMENT]
        assert sorted(opinions_of) == [("u1", FeedbackKind.APPROVAL), ("u2", FeedbackKind.DISAPPROVAL)]
    lost = [webui_feedback(1), CHAT | {"id": "c9"}, webui_feedback(1) | {"type": "arena"}]
    assert read_recording(write(tmp_path / "lost.json", lost)).dropped == {
        "row that is feedback without its chat: export the chats as well": 1,
        "row that is feedback of type 'arena', not a rating": 1,
        "rating that is not understood": 1,
    }
