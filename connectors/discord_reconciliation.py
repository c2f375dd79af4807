"""Reconciliation: what happened on Discord while nobody listened is learned from its API.

After a lost session or a restart nothing is replayed. Messages that are for us and were not heard are answered, and the
reactions on our recent answers are compared with what we recorded: what is missing is added, what is gone is taken back.
Both go the ways that live events go, which claim each event once. It knows no gateway.
"""

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import discord

from bot.types import now

if TYPE_CHECKING:
    from connectors.discord import Discord

log = logging.getLogger(__name__)

Readable = discord.TextChannel | discord.Thread | discord.PartialMessageable

MOST_ANSWERS = 200  # whose reactions are compared, newest first
MOST_MESSAGES = 200  # of one channel that are looked at


async def reconcile(connector: "Discord", client: discord.Client) -> None:
    """Bring messages and reactions of the last `discord.reconcile_hours` up to date; what cannot be read is logged."""
    since = now() - timedelta(hours=connector.config.reconcile_hours)
    call = connector.dialogue.store.database.call
    shown = await call(connector.answers.deliveries.since, "discord", since, MOST_ANSWERS)
    for answer in shown:
        try:
            await _reactions(connector, client, answer.channel, answer.message_id, answer.turn_id)
        except discord.HTTPException as error:
            log.info("the reactions on message %s cannot be read: %s", answer.message_id, error)
    places = {int(answer.channel) for answer in shown}
    for channel in _channels(client, places):
        try:
            async for message in channel.history(after=since, limit=MOST_MESSAGES, oldest_first=True):
                if client.user is not None:
                    await connector.missed(message, client.user)
        except discord.HTTPException as error:
            log.info("channel %s cannot be read: %s", channel.id, error)


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


async def _reactions(connector: "Discord", client: discord.Client, channel: str, message_id: str, turn_id: str) -> None:
    message = await client.get_partial_messageable(int(channel)).fetch_message(int(message_id))
    there = set()
    for reaction in message.reactions:
        symbol = reaction.emoji if isinstance(reaction.emoji, str) else reaction.emoji.name
        if connector.reactions.kind(symbol) is not None:
            there |= {(str(user.id), symbol) async for user in reaction.users() if not user.bot}
    await connector.answers.reconcile(turn_id, there)
