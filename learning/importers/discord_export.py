"""Discord export: read DiscordChatExporter's JSON files, one or several for each channel."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from learning.importers.channel_history import Post, Reaction, read_channel
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import OddRow, Recording

SPEECH = {"Default", "Reply", "ChatInputCommand", "ContextMenuCommand", "0", "19", "20", "23"}  # not pins, joins, calls …


class _Lenient(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)


class DiscordUser(_Lenient):
    """A person or a bot on Discord."""

    id: str
    name: str = ""
    nickname: str | None = None
    isBot: bool = False


class Emoji(_Lenient):
    """An emoji: a character, or a name with an id."""

    id: str | None = None
    name: str = ""


class DiscordReaction(_Lenient):
    """The reactions with one emoji. Files without names have only the count."""

    emoji: Emoji
    count: int = 0
    users: list[DiscordUser] | None = None


class Reference(_Lenient):
    """A reference to the message that is replied to."""

    messageId: str | None = None


class DiscordMessage(_Lenient):
    """One message of a channel."""

    id: str
    type: str = "Default"
    timestamp: datetime
    content: str = ""
    author: DiscordUser
    mentions: list[DiscordUser] = []
    reactions: list[DiscordReaction] = []
    reference: Reference | None = None


class Channel(_Lenient):
    """The channel of some messages."""

    id: str
    type: str = ""


class ChannelFile(_Lenient):
    """One exported file."""

    channel: Channel
    messages: list[Any]


def read_discord(rows: Sequence[RecordedRow], recording: Recording) -> None:
    """Read all channels of a recording."""
    channels: dict[str, tuple[RecordedRow, list[Post]]] = {}
    for row in rows:
        with recording.leaving_out(row.place):
            file = ChannelFile.model_validate(row.value)
            is_dialogue = file.channel.type.startswith("Direct") or "Thread" in file.channel.type
            thread = file.channel.id if "Thread" in file.channel.type else ""
            _, posts = channels.setdefault(file.channel.id, (row, []))
            for value in file.messages:
                with recording.leaving_out(row.place, "message"):
                    posts.append(_make_post(DiscordMessage.model_validate(value), thread, is_dialogue, row, recording))
    for key, (row, posts) in channels.items():
        read_channel(key, posts, row, recording)


def _make_post(message: DiscordMessage, thread: str, is_dialogue: bool, row: RecordedRow, recording: Recording) -> Post:
    """Return a message as a post. Raises OddRow if it is a notice of the platform."""
    if message.type not in SPEECH:
        raise OddRow("is a platform notice", message.type)
    text = message.content
    for user in message.mentions if not message.author.isBot else ():
        if user.isBot:
            for name in (user.nickname, user.name):
                text = text.replace(f"@{name}", "", 1) if name else text
    reactions = []
    for one in message.reactions:
        users = one.users or []
        people = [user.id for user in users if not user.isBot]
        recording.leave_out("reaction of a bot", row.place, one.emoji.name, len(users) - len(people))
        unnamed = max(min(one.count, 100_000) - len(users), 0)
        reactions.append(Reaction(one.emoji.name, tuple(people), unnamed))
    return Post(
        id=message.id,
        author=message.author.id,
        text=text.strip(),
        at=message.timestamp.timestamp(),
        is_bot=message.author.isBot,
        reply_to=(message.reference.messageId if message.reference else None) or "",
        mentions=frozenset(user.id for user in message.mentions),
        thread=thread,
        is_dialogue=is_dialogue,
        reactions=tuple(reactions),
    )
