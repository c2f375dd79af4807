"""Catch up, from Discord's API, on what happened while kibitz was not connected.

Discord replays nothing after a lost session or a restart. Missed messages that are addressed to us are answered, edits are
applied, and deleted messages are forgotten. The reactions to our recent answers are compared with the recorded ones: missing
reactions are added, and removed ones are taken back. All this takes the path of live events: the same lists and limits
hold, and each event is claimed once.
"""

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

import discord

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.config import DiscordConfig
from bot.errors import quote_first_line
from bot.store.deliveries import Delivery
from bot.types import now
from connectors.access import Access
from connectors.answers import Answers, catch_up_on_messages
from connectors.discord.reading import is_speech, make_event_id
from connectors.discord.roles import Roles
from connectors.opinions import ReactionSnapshot

log = logging.getLogger(__name__)

ReadableChannel = (
    discord.TextChannel | discord.VoiceChannel | discord.StageChannel | discord.Thread | discord.PartialMessageable
)

MOST_ANSWERS = 200  # the newest, whose reactions are compared
MOST_MESSAGES = 200  # the newest of each channel, which are read
UNKNOWN_MESSAGE = 10008  # Discord's code for a missing message in a channel that exists


class Bot(Protocol):
    """The connector that handles live events, as reconciliation uses it."""

    config: DiscordConfig
    dialogue: DialogueManager
    reactions: Reactions
    access: Access
    answers: Answers

    def admits(self, user_id: int, channel_id: int, roles: list[str] | None) -> bool:
        """Return whether a person with these roles may take part in a channel."""

    def is_addressed(self, message: discord.Message, me: discord.ClientUser) -> bool:
        """Return whether a message is addressed to us."""

    async def claim_missed(self, message: discord.Message, me: discord.ClientUser, roles: Roles, began: int | None) -> bool:
        """Return whether to answer a message now that may have been missed."""

    async def queue_missed(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Queue the answer to a missed message."""

    async def handle_edit(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Update a stored message that its author edited."""

    async def handle_deletion(self, channel_id: int, message_id: int) -> None:
        """Forget a deleted message."""


async def reconcile(bot: Bot, client: discord.Client) -> None:
    """Bring messages and reactions of the last `discord.reconcile_hours` up to date. Log what cannot be read."""
    since = now() - timedelta(hours=bot.config.reconcile_hours)
    call, roles = bot.dialogue.store.database.call, Roles(bot.access)
    shown = await call(bot.answers.deliveries.read_since, "discord", since, MOST_ANSWERS)
    parts: dict[str, list[Delivery]] = {}  # the messages of each turn: a reaction to any of them is an opinion on the turn
    for answer in shown:
        parts.setdefault(answer.turn_id, []).append(answer)
    for turn_id, messages in parts.items():
        try:
            await _reconcile_reactions(bot, client, roles, turn_id, messages)
        except Exception as error:  # Discord refuses it, or discord.py cannot read it: compare the rest
            log.info("the reactions on answer %s cannot be read: %s", turn_id, quote_first_line(error))
    said: list[discord.Message] = []
    for channel in _list_channels(client, {int(answer.channel) for answer in shown}):
        try:
            async for message in channel.history(after=since, limit=MOST_MESSAGES, oldest_first=False):
                said.append(message)  # noqa: PERF401 (an error keeps what was read before it)
        except Exception as error:  # as above
            log.info("channel %s cannot be read: %s", channel, quote_first_line(error))
    said.sort(key=lambda message: message.id)
    there = {make_event_id(message.id) for message in said}
    asked = await call(bot.dialogue.store.find_question_events, [answer.turn_id for answer in shown])
    for channel_id, event in sorted({(answer.channel, asked.get(answer.turn_id, "")) for answer in shown}):
        question = int(event.rpartition(":")[-1] or 0)
        if question and event not in there and await _is_gone(client, int(channel_id), question):
            await bot.handle_deletion(int(channel_id), question)  # before an answer can be made from it
    if client.user is not None:
        await _reconcile_messages(bot, client.user, roles, said)


async def _reconcile_messages(bot: Bot, me: discord.ClientUser, roles: Roles, said: list[discord.Message]) -> None:
    """Queue answers to the messages of `said` (oldest first) that were missed; apply edits of the others."""
    began: dict[int, int] = {}  # per channel, the first message to us; in a thread, later ones are to us too
    for message in said:
        if is_speech(message) and bot.is_addressed(message, me):
            began.setdefault(message.channel.id, message.id)
    await catch_up_on_messages(
        said,
        take=lambda message: bot.claim_missed(message, me, roles, began.get(message.channel.id)),
        answer=lambda message: bot.queue_missed(message, me),
        edit=lambda message: bot.handle_edit(message, me),
    )


async def _is_gone(client: discord.Client, channel: int, message: int) -> bool:
    try:
        await client.get_partial_messageable(channel).fetch_message(message)
    except discord.NotFound as error:
        return error.code == UNKNOWN_MESSAGE
    except discord.HTTPException as error:
        log.info("message %s cannot be read: %s", message, error)
    return False


def _list_channels(client: discord.Client, known: set[int]) -> Iterator[ReadableChannel]:
    """Yield every channel and thread of our guilds, and those where we spoke recently, such as direct messages."""
    seen = set()
    for guild in client.guilds:
        readable: list[ReadableChannel] = [
            *guild.text_channels,
            *guild.voice_channels,
            *guild.stage_channels,
            *guild.threads,
        ]
        for channel in readable:
            seen.add(channel.id)
            if not isinstance(channel, discord.PartialMessageable) and channel.last_message_id is not None:
                yield channel
    for number in known - seen:
        yield client.get_partial_messageable(number)


def _find_channel(client: discord.Client, number: int) -> ReadableChannel:
    """Return a channel. Its server is known only if discord.py knows the channel."""
    channel = client.get_channel(number)
    return channel if isinstance(channel, ReadableChannel) else client.get_partial_messageable(number)


async def _reconcile_reactions(
    bot: Bot, client: discord.Client, roles: Roles, turn_id: str, messages: list[Delivery]
) -> None:
    read_at, there, partial, admitted = now(), set(), set(), set()
    for shown in messages:
        message = await _find_channel(client, int(shown.channel)).fetch_message(int(shown.message_id))
        for reaction in message.reactions:
            symbol = reaction.emoji if isinstance(reaction.emoji, str) else reaction.emoji.name
            if bot.reactions.classify(symbol) is None:
                continue
            people = [user async for user in reaction.users(type=discord.ReactionType.normal)]
            if reaction.burst_count:
                people += [user async for user in reaction.users(type=discord.ReactionType.burst)]
            if len(people) < reaction.count:
                partial.add(symbol)
            for person in (one for one in people if not one.bot):
                there.add((shown.message_id, str(person.id), symbol))
                if bot.admits(person.id, message.channel.id, await roles.find_roles(message.guild, person)):
                    admitted.add(str(person.id))
    reading = ReactionSnapshot([one.message_id for one in messages], there, read_at, partial)
    await bot.answers.reconcile_reactions(turn_id, reading, admitted.__contains__)
