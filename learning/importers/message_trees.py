"""Message trees: build conversations whose messages may have several replies, from messages that name their parents."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from bot.types import Role
from learning.importers.recording import Draft, Recording


@dataclass(frozen=True)
class Node:
    """A message, and the one that it replies to."""

    id: str
    parent: str | None
    role: Role
    text: str
    author: str = ""
    is_deleted: bool = False


def add_tree(draft: Draft, nodes: Iterable[Node], recording: Recording, place: str) -> dict[str, str]:
    """Add messages to a conversation, each after its parent. Return the turn id of each answer by message id.

    Replies below a deleted or a missing message are left out.
    """
    replies: dict[str | None, list[Node]] = defaultdict(list)
    missing = 0
    for node in nodes:
        replies[node.parent].append(node)
        missing += 1
    turns: dict[str, str] = {}
    pending: list[tuple[Node, Node | None, str | None]] = [(root, None, None) for root in reversed(replies[None])]
    while pending:
        node, parent, reply_to = pending.pop()
        missing -= 1
        is_cut = node.is_deleted or (parent is not None and reply_to is None)
        said = None if is_cut else draft.add_message(node.id, node.role, node.text, reply_to, node.author)
        if node.is_deleted:
            recording.leave_out("deleted message, with the replies to it", place)
        if said is not None and reply_to is not None and parent is not None and node.role == Role.ASSISTANT:
            turns[node.id] = draft.add_turn(node.id, reply_to, said, node.text, parent.author or "user")
        pending += [(reply, node, said) for reply in reversed(replies[node.id])]
    recording.leave_out("message whose parent is missing", place, count=missing)
    return turns
