"""OpenAssistant: read messages with people's emoji and ranks, as trees or with one message per row."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from bot.types import FeedbackKind, Role
from learning.importers.chat_messages import parse_role
from learning.importers.message_trees import Node, add_tree
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import OddRow, Recording

MAX_PEOPLE = 100_000  # maximum count of one emoji
EMOJIS = {"+1": FeedbackKind.APPROVAL, "-1": FeedbackKind.DISAPPROVAL}


class EmojiTable(BaseModel):
    """The emoji of a message in table form: two lists of equal length."""

    name: list[str]
    count: list[Annotated[int, Field(ge=0, le=MAX_PEOPLE)]]


class OasstMessage(BaseModel):
    """One message of OpenAssistant."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    message_id: str
    parent_id: str | None = None
    role: Annotated[Role, BeforeValidator(parse_role)]
    text: str
    deleted: bool | None = None
    rank: float | None = None
    emojis: dict[str, Annotated[int, Field(ge=0, le=MAX_PEOPLE)]] | EmojiTable | None = None
    replies: list[Any] | None = None

    @property
    def node(self) -> Node:
        """The message as a node of a tree."""
        return Node(self.message_id, self.parent_id or None, self.role, self.text, is_deleted=bool(self.deleted))

    @property
    def reactions(self) -> Counter[str]:
        """How many people chose each emoji."""
        found = self.emojis
        return Counter(dict(zip(found.name, found.count, strict=False)) if isinstance(found, EmojiTable) else found or {})


class Tree(BaseModel):
    """A row: a whole tree, or one message of it."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    message_tree_id: str
    prompt: dict[str, Any] | None = None


def read_oasst(rows: Sequence[RecordedRow], recording: Recording) -> None:
    """Read all rows of a recording. The messages of one tree may be in several rows."""
    trees: dict[str, tuple[RecordedRow, dict[str, OasstMessage]]] = {}
    for row in rows:
        with recording.leaving_out(row.place):
            tree = Tree.model_validate(row.value)
            _, messages = trees.setdefault(tree.message_tree_id, (row, {}))
            for message in _unfold(row, tree.prompt, recording):
                if message.message_id in messages:
                    recording.leave_out("message with a duplicate id", row.place, message.message_id)
                else:
                    messages[message.message_id] = message
    for key, (row, messages) in trees.items():
        with recording.leaving_out(row.place):
            _add(key, messages, row, recording)


def _unfold(row: RecordedRow, prompt: dict[str, Any] | None, recording: Recording) -> Iterator[OasstMessage]:
    """Yield the messages of a row, each with its parent."""
    pending: list[tuple[Any, str | None]] = [(row.value if prompt is None else prompt, None)]
    while pending:
        value, parent = pending.pop()
        with recording.leaving_out(row.place, "row" if parent is None else "message"):
            message = OasstMessage.model_validate(value)
            yield message if prompt is None else message.model_copy(update={"parent_id": parent})
            pending += [(reply, message.message_id) for reply in reversed(message.replies or [])]


def _add(key: str, messages: dict[str, OasstMessage], row: RecordedRow, recording: Recording) -> None:
    draft = recording.start_draft(key)
    turns = add_tree(draft, [message.node for message in messages.values()], recording, row.place)
    if not draft.messages:
        raise OddRow("has no first message")
    said = {message.id for message in draft.messages}
    for message in messages.values():
        emojis = message.reactions
        turn = turns.get(message.message_id)
        if turn is not None:
            for emoji, kind in EMOJIS.items():
                draft.add_unnamed_feedback(turn, emojis.pop(emoji, 0), kind, emoji)
            if message.rank is not None:
                draft.add_unnamed_feedback(turn, 1, FeedbackKind.RANK, "rank", value=message.rank)
        if draft.make_id(message.message_id) in said:
            for emoji, count in emojis.items():
                where = "on a user's message" if emoji in EMOJIS else "(an action of the tool, not a reaction)"
                recording.leave_out(f"{emoji[:40]} {where}", row.place, count=count)
    recording.add(draft, row)
