"""Open WebUI: read exported chats with 👍 and 👎 on answers, and exported feedback, which contains the chats.

If both are given, one person's opinion on one answer counts once.
"""

import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bot.types import FeedbackKind
from learning.importers.chat_messages import RecordedMessage, parse_role
from learning.importers.message_trees import Node, add_tree
from learning.importers.ratings import parse_rating
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import OddRow, Recording

DETAILS = re.compile(r'<details type="(?:reasoning|tool_calls|code_interpreter)".*?</details>\s*', re.DOTALL)


class Opinion(BaseModel):
    """A person's opinion on an answer: an annotation in a chat, or the data of a feedback record."""

    rating: Any = None
    comment: Any = None

    @property
    def kind(self) -> FeedbackKind | None:
        """Approval for a positive rating, disapproval for a negative one, otherwise None."""
        found = parse_rating(self.rating)
        opinion = 0.0 if found is None else found.value if found.scale is None else found.scale.to_opinion(found.value)
        return None if not opinion else FeedbackKind.APPROVAL if opinion > 0 else FeedbackKind.DISAPPROVAL


class ChatNode(RecordedMessage):
    """A message of a chat, with its parent and annotation."""

    id: str | None = None
    parent: str | None = Field(None, validation_alias="parentId")
    annotation: Any = None


class ChatTree(BaseModel):
    """The message tree of a chat, by message id."""

    messages: dict[str, Any] = {}


class Chat(BaseModel):
    """The messages of a chat. Older exports have only the list."""

    history: ChatTree = ChatTree()
    messages: list[Any] = []


class ChatRecord(BaseModel):
    """An exported chat."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str | None = None
    user_id: str = "user"
    chat: Chat


class Meta(BaseModel):
    """The answer that feedback is about."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    message_id: str
    chat_id: str


class FeedbackSnapshot(BaseModel):
    """The chat at the time of the feedback, as a record or as a bare chat."""

    chat: dict[str, Any] | None = None


class FeedbackRecord(BaseModel):
    """An exported act of feedback."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    user_id: str = "user"
    type: str = "rating"
    data: Opinion
    meta: Meta
    snapshot: FeedbackSnapshot | None = None


@dataclass
class RatedChat:
    """The messages of one chat, and the newest opinion of each person on each message."""

    row: RecordedRow
    nodes: dict[str, Node] = field(default_factory=dict)
    opinions: dict[tuple[str, str], Opinion] = field(default_factory=dict)


def read_open_webui(rows: Sequence[RecordedRow], recording: Recording) -> None:
    """Read the chats, then the feedback, of a recording."""
    chats: dict[str, RatedChat] = {}
    records = []
    for row in rows:
        with recording.leaving_out(row.place):
            if "chat" in row.value:
                record = ChatRecord.model_validate(row.value)
                chat = chats.setdefault(record.id or row.place, RatedChat(row))
                _read_chat(record.chat, record.user_id, chat, recording)
            else:
                records.append((row, FeedbackRecord.model_validate(row.value)))
    for row, given in records:
        with recording.leaving_out(row.place):
            _read_feedback(row, given, chats, recording)
    for key, chat in chats.items():
        with recording.leaving_out(chat.row.place):
            _add(key, chat, recording)


def _read_chat(found: Chat, user: str, chat: RatedChat, recording: Recording) -> None:
    """Add the messages of a chat, and its user's opinions on them."""
    is_tree = bool(found.history.messages)
    previous = None
    for name, value in (found.history.messages or {str(at): one for at, one in enumerate(found.messages)}).items():
        with recording.leaving_out(chat.row.place, "message"):
            message = ChatNode.model_validate(value)
            id = name if is_tree else message.id or name
            parent = message.parent or (None if is_tree else previous)
            text = DETAILS.sub("", message.text)
            chat.nodes.setdefault(id, Node(id, parent, parse_role(message.role), text, user))
            if isinstance(message.annotation, dict):
                chat.opinions.setdefault((id, user), Opinion.model_validate(message.annotation))
            previous = id


def _read_feedback(row: RecordedRow, given: FeedbackRecord, chats: dict[str, RatedChat], recording: Recording) -> None:
    """Add an act of feedback, and the chat that it contains, if any."""
    if given.type != "rating":
        raise OddRow(f"is feedback of type {given.type[:40]!r}, not a rating")
    key, snapshot = given.meta.chat_id, given.snapshot.chat if given.snapshot else None
    if snapshot:
        found = Chat.model_validate(snapshot.get("chat", snapshot))  # a record, or a bare chat
        _read_chat(found, given.user_id, chats.setdefault(key, RatedChat(row)), recording)
    if key not in chats:
        raise OddRow("is feedback without its chat: export the chats as well")
    chats[key].opinions[given.meta.message_id, given.user_id] = given.data


def _add(key: str, chat: RatedChat, recording: Recording) -> None:
    draft = recording.start_draft(key)
    turns = add_tree(draft, chat.nodes.values(), recording, chat.row.place)
    for (message, person), opinion in chat.opinions.items():
        turn = turns.get(message)
        if turn is None:
            recording.leave_out("rating of a message that is missing or not an answer", chat.row.place, message)
            continue
        if isinstance(opinion.comment, str) and opinion.comment.strip():
            draft.add_feedback(turn, person, FeedbackKind.COMMENT, "comment", text=opinion.comment)
        if opinion.kind is not None:
            draft.add_feedback(turn, person, opinion.kind, "rating")
        elif opinion.rating is not None:
            recording.leave_out("rating that is not understood", chat.row.place, reprlib.repr(opinion.rating))
    recording.add(draft, chat.row)
