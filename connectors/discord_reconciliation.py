"""Reconciliation: what happened on Discord while nobody listened is learned from its API.

After a lost session or a restart nothing is replayed. Messages that are for us and were not heard are answered, those that
were changed are changed, those that are gone are forgotten, and the reactions on our recent answers are compared with what
we recorded: what is missing is added, what is gone is taken back. All go the ways that live events go, which claim each
event once. It knows no gateway.
"""

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import discord

from bot.deliveries import Delivery
from bot.types import now
from connectors.discord_messages import event_of

if TYPE_CHECKING:
    from connectors.discord import Discord

log = logging.getLogger(__name__)

Readable = discord.TextChannel | discord.Thread | discord.PartialMessageable

MOST_ANSWERS = 200  # whose reactions are compared, newest first
MOST_MESSAGES = 200  # of one channel that are looked at
UNKNOWN_MESSAGE = 10008  # Discord's code: the channel is there, the message is not


async def reconcile(connector: "Discord", client: discord.Client) -> None:
    """Bring messages and reactions of the last `discord.reconcile_hours` up to date; what cannot be read is logged."""
    since = now() - timedelta(hours=connector.config.reconcile_hours)
    call = connector.dialogue.store.database.call
    shown = await call(connector.answers.deliveries.since, "discord", since, MOST_ANSWERS)
    parts: dict[str, list[Delivery]] = {}  # the messages of each turn: a reaction to any of them is an opinion on the turn
    for answer in shown:
        parts.setdefault(answer.turn_id, []).append(answer)
    for turn_id, messages in parts.items():
        try:
            await _reactions(connector, client, turn_id, messages)
        except discord.HTTPException as error:
            log.info("the reactions on answer %s cannot be read: %s", turn_id, error)
    places = {int(answer.channel) for answer in shown}
    said: list[discord.Message] = []
    for channel in _channels(client, places):
        try:
            said += [message async for message in channel.history(after=since, limit=MOST_MESSAGES, oldest_first=True)]
        except discord.HTTPException as error:
            log.info("channel %s cannot be read: %s", channel.id, error)
    there = {event_of(message.id) for message in said}
    asked = await call(connector.dialogue.store.questions, [answer.turn_id for answer in shown])
    for channel_id, event in sorted({(answer.channel, asked.get(answer.turn_id, "")) for answer in shown}):
        question = int(event.rpartition(":")[-1] or 0)
        if question and event not in there and await _is_gone(client, int(channel_id), question):
            await connector.deleted(int(channel_id), question)  # before anything is answered that would be shown it
    for message in said:
        if client.user is not None:
            await connector.missed(message, client.user)


async def _is_gone(client: discord.Client, channel: int, message: int) -> bool:
    try:
        await client.get_partial_messageable(channel).fetch_message(message)
    except discord.NotFound as error:
        return error.code == UNKNOWN_MESSAGE
    except discord.HTTPException as error:
        log.info("message %s cannot be read: %s", message, error)
    return False


def _channels(client: discord.Client, known: set[int]) -> Iterator[Readable]:
    """Every channel and thread of our guilds, and those where we spoke lately (direct messages among them)."""
    seen = set()
    for guild in client.guilds:
        readable: list[discord.TextChannel | discord.Thread] = [*guild.text_channels, *guild.threads]
        for channel in readable:
            seen.add(channel.id)
            if channel.last_message_id is not None:
                yield channel
    for number in known - seen:
        yield client.get_partial_messageable(number)


async def _reactions(connector: "Discord", client: discord.Client, turn_id: str, messages: list[Delivery]) -> None:
    read_at, there = now(), set()
    for shown in messages:
        message = await client.get_partial_messageable(int(shown.channel)).fetch_message(int(shown.message_id))
        for reaction in message.reactions:
            symbol = reaction.emoji if isinstance(reaction.emoji, str) else reaction.emoji.name
            if connector.reactions.kind(symbol) is not None:
                there |= {(shown.message_id, str(user.id), symbol) async for user in reaction.users() if not user.bot}
    await connector.answers.reconcile(turn_id, [one.message_id for one in messages], there, read_at)
