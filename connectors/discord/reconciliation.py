"""Reconciliation: what happened on Discord while nobody listened is learned from its API.

After a lost session or a restart nothing is replayed. Messages that are for us and were not heard are answered, those that
were changed are changed, those that are gone are forgotten, and the reactions on our recent answers are compared with what
we recorded: what is missing is added, what is gone is taken back. All go the ways that live events go: the same lists and
limits hold, and each event is claimed once. It knows no gateway.
"""

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

import discord

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.config import DiscordConfig
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

MOST_ANSWERS = 200  # whose reactions are compared, newest first
MOST_MESSAGES = 200  # of one channel that are looked at, newest first
UNKNOWN_MESSAGE = 10008  # Discord's code: the channel is there, the message is not


class Bot(Protocol):
    """What hears the live events, and is told of those that were missed."""

    config: DiscordConfig
    dialogue: DialogueManager
    reactions: Reactions
    access: Access
    answers: Answers

    def admits(self, user_id: int, channel_id: int, roles: list[str] | None) -> bool:
        """Tell whether a person with these roles may take part in a channel."""

    def is_addressed(self, message: discord.Message, me: discord.ClientUser) -> bool:
        """Tell whether a message is said to us."""

    async def claim_missed(self, message: discord.Message, me: discord.ClientUser, roles: Roles, began: int | None) -> bool:
        """Return whether a message is to be answered now that may have been missed."""

    async def queue_missed(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Have a message answered that was missed."""

    async def handle_edit(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Take over what the author of a message changed."""

    async def handle_deletion(self, channel_id: int, message_id: int) -> None:
        """Forget a message that is gone."""


async def reconcile(bot: Bot, client: discord.Client) -> None:
    """Bring messages and reactions of the last `discord.reconcile_hours` up to date; what cannot be read is logged."""
    since = now() - timedelta(hours=bot.config.reconcile_hours)
    call, roles = bot.dialogue.store.database.call, Roles(bot.access)
    shown = await call(bot.answers.deliveries.read_since, "discord", since, MOST_ANSWERS)
    parts: dict[str, list[Delivery]] = {}  # the messages of each turn: a reaction to any of them is an opinion on the turn
    for answer in shown:
        parts.setdefault(answer.turn_id, []).append(answer)
    for turn_id, messages in parts.items():
        try:
            await _reconcile_reactions(bot, client, roles, turn_id, messages)
        except Exception as error:  # what Discord refuses, or discord.py cannot read: the rest is compared all the same
            log.info("the reactions on answer %s cannot be read: %r", turn_id, error)
    said: list[discord.Message] = []
    for channel in _list_channels(client, {int(answer.channel) for answer in shown}):
        try:
            async for message in channel.history(after=since, limit=MOST_MESSAGES, oldest_first=False):
                said.append(message)  # noqa: PERF401 (what was read before something cannot be read is kept)
        except Exception as error:  # as above
            log.info("channel %s cannot be read: %r", channel, error)
    said.sort(key=lambda message: message.id)
    there = {make_event_id(message.id) for message in said}
    asked = await call(bot.dialogue.store.find_question_events, [answer.turn_id for answer in shown])
    for channel_id, event in sorted({(answer.channel, asked.get(answer.turn_id, "")) for answer in shown}):
        question = int(event.rpartition(":")[-1] or 0)
        if question and event not in there and await _is_gone(client, int(channel_id), question):
            await bot.handle_deletion(int(channel_id), question)  # before anything is answered that would be shown it
    if client.user is not None:
        await _reconcile_messages(bot, client.user, roles, said)


async def _reconcile_messages(bot: Bot, me: discord.ClientUser, roles: Roles, said: list[discord.Message]) -> None:
    """Have those of these messages (oldest first) answered that were missed; take over what was changed of the others."""
    began: dict[int, int] = {}  # the first message to us in each channel: in a thread, later ones are to us as well
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
    """Every channel and thread of our guilds, and those where we spoke lately (direct messages among them)."""
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
    """A channel; which server it is on is known only if the channel is."""
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
