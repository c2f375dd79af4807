"""Chat messages: read the different notations of a chat, and rated chats in JSON rows.

It reads OpenAI's `messages` with `role` and `content`, ShareGPT's `conversations` with `from` and `value`, and plain texts.
Tool messages, and content other than text, are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field

from bot.types import Role
from learning.importers.ratings import find_rating
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import Draft, OddRow, Recording

ROLES = {
    **dict.fromkeys(("system", "developer"), Role.SYSTEM),
    **dict.fromkeys(("user", "human", "prompter", "customer"), Role.USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), Role.ASSISTANT),
}
TOOLS = ("tool", "function", "function_call", "function-call", "tool_call", "observation", "tool_response")


class RecordedMessage(BaseModel):
    """One message as it is written in a file."""

    role: str = Field(validation_alias=AliasChoices("role", "from"))
    content: str | list[str | dict[str, Any]] | None = Field(None, validation_alias=AliasChoices("content", "value", "text"))

    @property
    def text(self) -> str:
        """The text of a message, without other content."""
        if not isinstance(self.content, list):
            return self.content or ""
        parts = [part if isinstance(part, str) else part.get("text") for part in self.content]
        return "".join(part for part in parts if isinstance(part, str))

    @property
    def has_more_than_text(self) -> bool:
        """Whether the message has a picture, a sound or a file."""
        parts = self.content if isinstance(self.content, list) else []
        return any(not isinstance(part, str) and not isinstance(part.get("text"), str) for part in parts)


class ChatRow(BaseModel):
    """A row with a chat."""

    messages: Annotated[
        list[Any], Field(min_length=1, validation_alias=AliasChoices("messages", "conversations", "conversation"))
    ]


@dataclass(frozen=True)
class RatedMessage:
    """One message with its author's role and its rating as it is written."""

    role: Role
    text: str
    rating: Any = None


def parse_role(name: str) -> Role:
    """Return the role of a speaker's name. Raises OddRow if the name is unknown."""
    found = ROLES.get(name.strip().lower())
    if found is None:
        raise OddRow(f"has the unknown role {name[:40]!r}")
    return found


def read_chat(value: Any, speaker: Role, recording: Recording, row: RecordedRow) -> list[RatedMessage]:
    """Return the messages of a text (by `speaker`), a message, or a list of those. What is left out is counted."""
    if isinstance(value, str):
        return [RatedMessage(speaker, value)]
    found = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, str):
            found.append(RatedMessage(speaker, one))
            continue
        message = RecordedMessage.model_validate(one)
        if message.has_more_than_text:
            recording.leave_out("message part that is not text", row.place)
        if message.role.lower() in TOOLS:
            recording.leave_out("tool message", row.place)
        elif message.content is None:
            recording.leave_out("message without content", row.place)
        else:
            found.append(RatedMessage(parse_role(message.role), message.text, find_rating(one)))
    return found


def add_chat(
    draft: Draft, said: Sequence[RatedMessage], previous: str | None = None, start: int = 0
) -> tuple[str | None, str | None]:
    """Add messages to a conversation, each a reply to the one before; return the last message and the last turn."""
    turn, is_asked = None, previous is not None
    for index, one in enumerate(said, start):
        message = draft.add_message(str(index), one.role, one.text, previous)
        if one.role == Role.ASSISTANT and previous is not None and is_asked:
            turn = draft.add_turn(str(index), previous, message, one.text)
            if one.rating is not None:
                draft.add_rating(turn, one.rating)
        is_asked = is_asked or one.role == Role.USER
        previous = message
    return previous, turn


def read_rated_chat(row: RecordedRow, recording: Recording) -> None:
    """Read a row with a chat. A rating of the whole chat applies to its last answer; messages may have their own ratings."""
    said = read_chat(ChatRow.model_validate(row.value).messages, Role.USER, recording, row)
    draft = recording.start_draft(row.place)
    _, turn = add_chat(draft, said)
    if not draft.messages:
        raise OddRow("has no message with text")
    rating = find_rating(row.value)
    if rating is not None:
        if turn is None:
            raise OddRow("has a rating but no answer to a message")
        draft.add_rating(turn, rating)
    recording.add(draft, row)
    if not draft.ratings:
        recording.leave_out("conversation without a rating", row.place)
