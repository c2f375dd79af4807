"""Read what a Discord message says, as text.

This covers its words, with names as people see them, forwarded messages, polls, and text files (Discord turns long pastes
into files). Things that cannot be read are named.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import PurePath

import aiohttp
import discord

from bot.errors import quote_first_line
from bot.types import Message
from connectors.discord.markup import Markup
from connectors.reading import KINDS, LARGEST_FILE, TEXT_TYPES, MessageContent

log = logging.getLogger(__name__)

SPEECH = {  # the other types report events, such as a renamed thread
    discord.MessageType.default,
    discord.MessageType.reply,
    discord.MessageType.chat_input_command,
    discord.MessageType.thread_starter_message,
    discord.MessageType.context_menu_command,
}
FILE_SECONDS = 10.0
TEXT_NAMES = {".txt", ".md", ".log", ".csv", ".json", ".yaml", ".yml", ".toml", ".xml", ".ini", ".py", ".js", ".html"}

MessageOrSnapshot = discord.Message | discord.MessageSnapshot


def make_event_id(message_id: int) -> str:
    """Return the id of a message's event in the database."""
    return f"discord:{message_id}"


def is_speech(message: discord.Message) -> bool:
    """Return whether a message is something that a person says."""
    return message.type in SPEECH and not message.author.bot and message.webhook_id is None


def make_message(message: discord.Message, text: str) -> Message:
    """Return a person's message as the dialogue keeps it, with no conversation yet."""
    author, event = message.author, make_event_id(message.id)
    return Message("", str(author.id), text, event_id=event, at=message.created_at, author_name=author.display_name)


async def read(message: discord.Message, markup: Markup) -> MessageContent:
    """Read all of a message, including text files."""
    files: dict[int, str] = {}
    left = LARGEST_FILE
    for one in (one for part in _parts(message) for one in part.attachments if _is_text(one)):
        content = await _read_file(one) if one.size <= left else None
        if content is not None:
            files[one.id], left = content, left - one.size
    return _compose_content(message, markup, files)


def read_words(message: discord.Message, markup: Markup) -> str:
    """Return a message as people see it who scroll past it: its files are only named."""
    return _compose_content(message, markup, {}).text


def _compose_content(message: discord.Message, markup: Markup, files: dict[int, str]) -> MessageContent:
    words, named, unread = [], [], dict[str, None]()
    for part in _parts(message):
        words.append(markup.make_readable(part.content, message))
        for one in part.attachments:
            if one.id in files:
                words.append(f"{one.filename}:\n{files[one.id]}")
            else:
                unread[_kind(one)] = None
                named.append(f"[{one.filename}: not readable]")
        for sticker in part.stickers:
            unread["stickers"] = None
            named.append(f"[sticker: {sticker.name}]")
    if message.poll is not None:
        words.append(f"{message.poll.question}\n" + "\n".join(f"- {answer.text or ''}" for answer in message.poll.answers))
    text = "\n".join(one for one in words if one)
    return MessageContent("\n".join([text, *named]) if text else "", tuple(unread))


def _parts(message: discord.Message) -> Sequence[MessageOrSnapshot]:
    """Return the message itself and those that it forwards."""
    return [message, *message.message_snapshots]


def _kind(attachment: discord.Attachment) -> str:
    if attachment.is_voice_message():
        return "voice messages"
    return KINDS.get((attachment.content_type or "").partition("/")[0], "such files")


def _is_text(attachment: discord.Attachment) -> bool:
    known = (attachment.content_type or "").startswith(TEXT_TYPES)
    return known or PurePath(attachment.filename).suffix.lower() in TEXT_NAMES


async def _read_file(attachment: discord.Attachment) -> str | None:
    """Return the content of a text file, or None if it cannot be read."""
    try:
        async with asyncio.timeout(FILE_SECONDS):
            return (await attachment.read()).decode("utf-8-sig", "replace").strip()
    except (discord.HTTPException, aiohttp.ClientError, TimeoutError) as error:
        log.info("the file %s cannot be read: %s", attachment.id, quote_first_line(error))
        return None
