"""Find the conversation that a message on Discord belongs to, and what was said there before.

A thread or a direct message is one conversation; in a channel a mention begins one, and replies continue it. A thread has
the scope of its channel, unless it is private.
"""

import logging
from dataclasses import replace

import discord

from bot.chat.dialogue import DialogueManager
from bot.types import Conversation, Message, Turn
from connectors.answers import Answers
from connectors.discord.reading import SPEECH, make_event_id

log = logging.getLogger(__name__)


def make_channel_conversation(message: discord.Message) -> Conversation:
    """Return the channel of a message as a conversation without a thread."""
    space = "" if message.guild is None else str(message.guild.id)
    return Conversation("discord", str(message.channel.id), space, is_public=is_public(message))


def find_reply_target(message: discord.Message) -> discord.Message | None:
    """Return the message that another replies to, or None if Discord did not send it along."""
    found = None if message.reference is None else message.reference.resolved
    return found if isinstance(found, discord.Message) else None


def is_public(message: discord.Message) -> bool:
    """Return whether everybody on the server may read the channel of a message."""
    channel, guild = message.channel, message.guild
    if guild is None or guild.default_role is None or isinstance(channel, (discord.DMChannel, discord.GroupChannel)):
        return False
    if isinstance(channel, discord.PartialMessageable) or (isinstance(channel, discord.Thread) and channel.is_private()):
        return False
    try:
        return channel.permissions_for(guild.default_role).view_channel
    except discord.ClientException:  # a thread whose channel is unknown
        return False


class Places:
    """The conversations of one bot. `reads_all`: Discord also sends it the text of messages that do not mention it."""

    def __init__(self, dialogue: DialogueManager, answers: Answers, reads_all: bool):
        self.dialogue, self.answers, self.reads_all = dialogue, answers, reads_all
        self._call = dialogue.store.database.call

    def may_be_in_own_thread(self, message: discord.Message) -> bool:
        """Return whether a message may be addressed to us because it is in a thread."""
        return self.reads_all and isinstance(message.channel, discord.Thread)

    async def is_in_own_thread(self, message: discord.Message, me: discord.ClientUser) -> bool:
        """Return whether a message is in a thread that we started, or in which we answered an earlier message."""
        if not self.may_be_in_own_thread(message):
            return False
        first = await self._call(self.answers.deliveries.find_first_question_event, await self.find_conversation(message))
        began = first is not None and int(first.rpartition(":")[2]) < message.id
        return began or getattr(message.channel, "owner_id", None) == me.id

    async def find_conversation(self, message: discord.Message) -> Conversation:
        """Return the conversation that a message belongs to.

        A thread has the scope of its channel, unless it is private. A thread that began at an answer or a question
        continues its conversation, as a reply to either does.
        """
        channel, here, reference = message.channel, make_channel_conversation(message), message.reference
        if message.guild is None or (isinstance(channel, discord.Thread) and channel.is_private()):
            return here
        if isinstance(channel, discord.Thread):
            here = replace(here, channel=str(channel.parent_id))
            return await self._find_conversation_with(channel.id, here) or replace(here, thread=str(channel.id))
        begun = reference and reference.message_id and await self._find_conversation_with(reference.message_id, here)
        return begun or replace(here, thread=str(message.id))

    async def find_earlier(
        self, message: discord.Message, me: discord.ClientUser, place: Conversation
    ) -> list[discord.Message]:
        """Return the messages that a message may be about, oldest first.

        These are the one that it replies to and, in a thread, those before our first answer.
        """
        found = [message]
        if (
            self.may_be_in_own_thread(message)
            and await self._call(self.answers.deliveries.find_first_question_event, place) is None
        ):
            try:
                most = self.dialogue.tracker.config.recent
                found += [one async for one in message.channel.history(limit=most, before=message)]
            except discord.HTTPException as error:
                log.info("thread %s cannot be read: %s", message.channel.id, error)
        starter = discord.MessageType.thread_starter_message
        shown = [find_reply_target(one) if one is message or one.type == starter else one for one in found]
        said = {one.id: one for one in shown if one is not None and one.author.id != me.id and one.type in SPEECH}
        return [one for _, one in sorted(said.items())]

    async def _find_conversation_with(self, message_id: int, here: Conversation) -> Conversation | None:
        """Return the conversation of a message that we sent or stored, or None if there is none in this channel."""
        store, turn_id = self.dialogue.store, await self.answers.find_turn_id(str(message_id))
        if turn_id is not None:
            known: Turn | Message | None = await self._call(store.find_turn, turn_id)  # None while it still grows
        else:
            known = await self._call(store.find_message_of_event, make_event_id(message_id))
        if known is None or (isinstance(known, Message) and known.is_forgotten):
            return None
        found = await self._call(store.read_conversation, known.conversation_id)
        return found if (found.space, found.channel) == (here.space, here.channel) else None  # forwarded from elsewhere
