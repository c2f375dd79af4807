"""Discord: mentions, replies, direct messages and threads are answered; reactions and buttons become feedback.

Answers grow by edits, long ones go on in further messages, and buttons stand under the last part. A thread or a direct
message is one conversation; in a channel a mention begins one, and replies to its answers go on with it. It knows no model
and no training.

Run: ``kibitz serve`` with `[discord] token_env` set.
"""

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable
from typing import Any

import discord

from bot.config import DiscordConfig
from bot.dialogue import ReplyOptions
from bot.environment import find_proxy
from bot.errors import ConfigError, ConnectorError
from bot.feedback import standing
from bot.types import Conversation, Feedback, FeedbackKind, Message, Turn, new_id, now
from connectors.access import TOO_FAST
from connectors.answers import BUSY, Answers
from connectors.base import Lanes, Shared, pause
from connectors.commands import COMMANDS, Asker, Command, Commands
from connectors.discord_messages import LIMIT, Button, Reason, Shown, event_of, typing
from connectors.discord_reconciliation import reconcile
from connectors.splitting import split
from connectors.streaming import Budgets

log = logging.getLogger(__name__)

RECONNECT = 5.0  # seconds, doubled up to a minute


def token(config: DiscordConfig) -> str:
    """The bot's token. Raises ConfigError where the variable is not set or holds something else."""
    found = os.environ.get(config.token_env, "").strip()
    key = f"config key discord.token_env has value '{config.token_env}'"
    if not found:
        raise ConfigError(f"{key}, a variable that is not set; set it to the bot's token")
    if found.startswith(("xox", "xapp")):
        raise ConfigError(f"{key}, a variable that holds a Slack token; put the Discord bot's there")
    return found


class Discord:
    """One bot user."""

    name = "discord"

    def __init__(self, shared: Shared, config: DiscordConfig, bot_token: str):
        self.dialogue = shared.dialogue
        self.reactions = shared.reactions
        self.access = shared.access
        self.config = config
        self.lanes = Lanes(config.waiting)
        self.budgets = Budgets(config.edits, config.edit_seconds)
        self.answers = Answers(shared, self.name)
        self.commands = Commands(shared.desk, shared.access, self.answers)
        self._token = bot_token
        self._client: discord.Client | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until `stop`. Raises ConnectorError where Discord refuses the token or an intent."""
        wait = RECONNECT
        while not self._stopping.is_set():
            self._client = _Client(self)
            try:
                await self._client.start(self._token)
                wait = RECONNECT
            except discord.LoginFailure as error:
                raise ConnectorError(
                    f"Discord rejects the token in ${self.config.token_env} (config key discord.token_env); make a new one"
                ) from error
            except discord.PrivilegedIntentsRequired as error:
                raise ConnectorError(
                    "Discord refuses the message content intent (config key discord.message_content); "
                    "turn it on in the developer portal, or set the key to false"
                ) from error
            except Exception as error:  # any malformed payload ends discord.py's loop; ours goes on
                if not self._stopping.is_set():
                    log.warning("the connection to Discord ended (%r); again in %.0f s", error, wait)
            finally:
                if not self._client.is_closed():
                    await self._client.close()
            await pause(self._stopping, wait)
            wait = min(60, 2 * wait)

    async def stop(self) -> None:
        """Take nothing new in, let answers end, close the connection."""
        self._stopping.set()
        await self.lanes.close(10)
        if self._client is not None:
            await self._client.close()

    def heard(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Queue a message that is for us. Called in the order of events; never waits."""
        text = self._for_us(message, me)
        user, channel = str(message.author.id), str(message.channel.id)
        if not text:
            return
        if not self.access.in_time("discord", user):
            self._soon(message.reply(TOO_FAST, mention_author=False))
        elif not self.lanes.put(channel, lambda: self._answer(message, text)):
            self._soon(message.reply(BUSY, mention_author=False))

    async def missed(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Have a message answered that may have been missed; of one that has its answer, take over what was changed."""
        text = self._for_us(message, me)
        if text and await self.answers.needs_answer(event_of(message.id)):
            await self.lanes.put_patiently(str(message.channel.id), lambda: self._answer(message, text))
        else:
            await self.edited(message, me)

    async def edited(self, message: discord.Message, me: discord.ClientUser) -> None:
        """The author of a message changed it: what we heard of it is changed too, after what is under way there."""
        text, at, event = _without_mention(message, me), message.edited_at, event_of(message.id)
        if text and at is not None and not message.author.bot:
            await self.lanes.put_patiently(str(message.channel.id), lambda: self.dialogue.edit(event, text, at))

    async def deleted(self, channel_id: int, message_id: int) -> None:
        """A message is gone: if we heard it, it is forgotten, after what is under way there."""
        await self.lanes.put_patiently(str(channel_id), lambda: self.dialogue.delete(event_of(message_id)))

    async def opinion(self, event: discord.RawReactionActionEvent, added: bool) -> None:
        """A reaction that came or went becomes feedback; neutral emoji and messages that are not ours do not."""
        at, symbol = now(), event.emoji.name or ""
        kind = self.reactions.kind(symbol)
        bot = event.member is not None and event.member.bot
        if kind is None or bot or not self.access.admits(str(event.user_id), str(event.channel_id), _roles(event.member)):
            return
        given = Feedback("", str(event.user_id), kind, signal=symbol, retracts=not added, at=at)
        await self.answers.reacted(str(event.channel_id), str(event.message_id), given)

    async def cleared(self, message_id: int, symbol: str | None) -> None:
        """All reactions on a message are gone, or all with one emoji: every one of them is taken back."""
        turn_id = await self.answers.turn_of(str(message_id))
        if turn_id is not None:
            await self.answers.cleared(turn_id, str(message_id), symbol)

    async def pressed(self, act: str, turn_id: str, interaction: discord.Interaction) -> None:
        """A button under an answer. What it says is committed before Discord is told."""
        user = str(interaction.user.id)
        event = f"discord:{interaction.id}"
        if not self.access.admits(user, str(interaction.channel_id), _roles(interaction.user)):
            await interaction.response.send_message("You may not do that here.", ephemeral=True)
        elif act == "stop":
            self.answers.stop(turn_id)
            await interaction.response.defer()
        elif act == "again":
            await interaction.response.defer()
            if not self.lanes.put(str(interaction.channel_id), lambda: self._again(turn_id, user, interaction)):
                await interaction.followup.send(BUSY, ephemeral=True)
        else:
            kind = FeedbackKind.APPROVAL if act == "up" else FeedbackKind.DISAPPROVAL
            given = standing((await self.dialogue.explain(turn_id)).feedback)
            again = any((row.user_id, row.kind, row.signal) == (user, kind, "button") for row in given)
            await self.answers.record(Feedback(turn_id, user, kind, signal="button", retracts=again, event_id=event))
            if act == "down" and not again:
                await interaction.response.send_modal(Reason(self, turn_id))
            else:
                await interaction.response.send_message("Taken back." if again else "Noted, thank you.", ephemeral=True)

    async def commented(self, turn_id: str, user: str, text: str, event: str) -> None:
        """Why somebody did not like an answer."""
        await self.answers.record(Feedback(turn_id, user, FeedbackKind.COMMENT, signal="reason", text=text, event_id=event))

    def _for_us(self, message: discord.Message, me: discord.ClientUser) -> str:
        """What a message says to us; "" where it is not for us, or its author may not talk to us here."""
        direct = message.guild is None
        mentioned = any(user.id == me.id for user in message.mentions)
        followed = self.config.message_content and isinstance(message.channel, discord.Thread)
        user, channel = str(message.author.id), str(message.channel.id)
        if message.author.bot or not (direct or mentioned or followed):
            return ""
        admitted = self.access.admits(user, channel, _roles(message.author))
        return _without_mention(message, me) if admitted else ""

    async def _answer(self, message: discord.Message, text: str) -> None:
        said = Message("", str(message.author.id), text, event_id=event_of(message.id))
        place = await self._place(message)
        await self._post(message, lambda options: self.dialogue.respond(said, options, place=place))

    async def _again(self, turn_id: str, user: str, interaction: discord.Interaction) -> None:
        message = interaction.message
        if message is not None:
            await self._post(message, lambda options: self.dialogue.regenerate(turn_id, user, options))

    async def _post(self, message: discord.Message, ask: Callable[[ReplyOptions], Awaitable[Turn]]) -> None:
        """Show an answer while it grows, then whole, under `message`."""
        async with typing(message.channel):
            await self.answers.give(ask, Shown(self, message, new_id()), self.budgets.of(str(message.channel.id)))

    async def _place(self, message: discord.Message) -> Conversation:
        """The conversation that a message belongs to."""
        space = "" if message.guild is None else str(message.guild.id)
        if message.guild is None or isinstance(message.channel, discord.Thread):
            return Conversation("discord", str(message.channel.id), space, is_public=_is_public(message))
        if message.reference is not None and message.reference.message_id is not None:
            turn_id = await self.answers.turn_of(str(message.reference.message_id))
            if turn_id is not None:
                turn = (await self.dialogue.explain(turn_id)).turn
                return await self.dialogue.store.database.call(self.dialogue.store.conversation, turn.conversation_id)
        thread = str(message.id)
        return Conversation("discord", str(message.channel.id), space, thread, is_public=_is_public(message))

    def _soon(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())


class _Client(discord.Client):
    """discord.py's client; every event goes to the connector."""

    def __init__(self, connector: Discord):
        intents = discord.Intents.default()
        intents.message_content = connector.config.message_content
        mentions = discord.AllowedMentions(everyone=False, users=False, roles=False, replied_user=True)
        proxy = find_proxy(discord.http.Route.BASE)  # discord.py does not look for one
        super().__init__(intents=intents, allowed_mentions=mentions, proxy=proxy)
        self.connector = connector

    async def setup_hook(self) -> None:
        self.add_dynamic_items(Button)
        tree = discord.app_commands.CommandTree(self)
        for command in COMMANDS:
            tree.add_command(self._slash(command))
        try:
            await tree.sync()
        except discord.HTTPException as error:
            log.warning("the slash commands could not be registered: %s", error)

    def _slash(self, command: Command) -> discord.app_commands.Command[Any, Any, None]:
        async def run(interaction: discord.Interaction[Any], choice: str = "") -> None:
            asker = Asker(str(interaction.user.id), str(interaction.channel_id), _roles(interaction.user))
            await interaction.response.defer(ephemeral=True)  # forgetting may take longer than Discord waits
            told = await self.connector.commands.run(command, asker, choice)
            await interaction.followup.send(split(told, LIMIT)[0].text, ephemeral=True)

        async def plain(interaction: discord.Interaction[Any]) -> None:
            await run(interaction)

        made: Any = discord.app_commands.Command(
            name=command.name, description=command.description, callback=run if command.choices else plain
        )
        if command.choices:
            discord.app_commands.choices(
                choice=[discord.app_commands.Choice(name=one, value=one) for one in command.choices]
            )(made)
        return made

    async def on_ready(self) -> None:
        # A new session: nothing is replayed. (A resumed one is, and does not come here.)
        await reconcile(self.connector, self)

    async def on_message(self, message: discord.Message) -> None:
        if self.user is not None:
            self.connector.heard(message, self.user)

    async def on_raw_message_edit(self, event: discord.RawMessageUpdateEvent) -> None:
        if self.user is not None:
            await self.connector.edited(event.message, self.user)

    async def on_raw_message_delete(self, event: discord.RawMessageDeleteEvent) -> None:
        await self.connector.deleted(event.channel_id, event.message_id)

    async def on_raw_bulk_message_delete(self, event: discord.RawBulkMessageDeleteEvent) -> None:
        for message_id in sorted(event.message_ids):
            await self.connector.deleted(event.channel_id, message_id)

    async def on_raw_reaction_add(self, event: discord.RawReactionActionEvent) -> None:
        if self.user is not None and event.user_id != self.user.id:
            await self.connector.opinion(event, added=True)

    async def on_raw_reaction_remove(self, event: discord.RawReactionActionEvent) -> None:
        await self.connector.opinion(event, added=False)

    async def on_raw_reaction_clear(self, event: discord.RawReactionClearEvent) -> None:
        await self.connector.cleared(event.message_id, None)

    async def on_raw_reaction_clear_emoji(self, event: discord.RawReactionClearEmojiEvent) -> None:
        await self.connector.cleared(event.message_id, event.emoji.name)


def _is_public(message: discord.Message) -> bool:
    """Whether everybody on the server may read the channel of a message."""
    channel, guild = message.channel, message.guild
    if guild is None or guild.default_role is None or isinstance(channel, (discord.DMChannel, discord.GroupChannel)):
        return False
    if isinstance(channel, discord.PartialMessageable) or (isinstance(channel, discord.Thread) and channel.is_private()):
        return False
    try:
        return channel.permissions_for(guild.default_role).view_channel
    except discord.ClientException:  # a thread whose channel is not known
        return False


def _without_mention(message: discord.Message, me: discord.ClientUser) -> str:
    return re.sub(rf"<@!?{me.id}>\s*", "", message.content).strip()


def _roles(user: object) -> list[str]:
    return [str(role.id) for role in user.roles] if isinstance(user, discord.Member) else []
