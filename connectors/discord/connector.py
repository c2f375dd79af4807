"""Answer mentions, replies, direct messages and threads on Discord; turn reactions and buttons into feedback.

Answers grow by edits; long ones continue in further messages, with buttons under the last part. A thread or a direct
message is one conversation; in a channel a mention begins one, and replies to its answers continue it.

Run: ``kibitz serve`` with `[discord] token_env` set.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import discord

from bot.chat.dialogue import ReplyOptions
from bot.config import DiscordConfig
from bot.environment import find_proxy
from bot.errors import ConnectorError, quote_first_line
from bot.types import Conversation, Feedback, Message, Turn, new_id, now
from connectors.access import TOO_FAST
from connectors.answers import BUSY, Answers
from connectors.base import Lanes, Services, Work, sleep_unless_stopped
from connectors.commands import COMMANDS, Asker, Command, Commands
from connectors.discord.interactions import DiscordInteractions
from connectors.discord.markup import Markup, mentions_us
from connectors.discord.messages import LIMIT, Button, DiscordAnswer, typing
from connectors.discord.payloads import tolerate_bad_messages
from connectors.discord.places import Places, find_reply_target, make_channel_conversation
from connectors.discord.reading import is_speech, make_event_id, make_message, read, read_words
from connectors.discord.reconciliation import reconcile
from connectors.discord.roles import Roles, read_roles
from connectors.splitting import split
from connectors.streaming import Budgets

log = logging.getLogger(__name__)
RECONNECT_SECONDS = 5.0  # doubled up to a minute
READY_SECONDS = 2.0  # without a further server until all count as known and reconciliation begins


class Discord:
    """The connector of one bot user."""

    name = "discord"

    def __init__(self, services: Services, config: DiscordConfig, bot_token: str):
        self.dialogue = services.dialogue
        self.reactions = services.reactions
        self.access = services.access
        self.config = config
        self.lanes = Lanes(config.waiting)
        self.budgets = Budgets(config.edits, config.edit_seconds)
        self.answers = Answers(services, self.name)
        self.places = Places(services.dialogue, self.answers, config.message_content)
        self.commands = Commands(services.desk, services.access, self.answers)
        self.interactions = DiscordInteractions(self.answers, self.admits, self._queue_regeneration)
        self._call = services.dialogue.store.database.call
        self._pending: set[int] = set()  # messages that wait or are being answered; reconciliation skips them
        self._token = bot_token
        self._client: discord.Client | None = None
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until `stop`. Raises ConnectorError if Discord refuses the token or an intent."""
        wait = RECONNECT_SECONDS
        while not self._stopping.is_set():
            self._client = _Client(self)
            try:
                await self._client.start(self._token)
                wait = RECONNECT_SECONDS
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
                    log.warning("Discord cannot be reached (%s); again in %.0f s", quote_first_line(error), wait)
            finally:
                if not self._client.is_closed():
                    await self._client.close()
            await sleep_unless_stopped(self._stopping, wait)
            wait = min(60, 2 * wait)

    async def stop(self) -> None:
        """Accept nothing new, let answers end, and close the connection."""
        self._stopping.set()
        await self.lanes.close(10)
        if self._client is not None:
            await self._client.close()

    def handle_message(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Queue a message that is, or may be, addressed to us. Call it in the order of events; it never waits."""
        if message.id in self._pending or not (is_speech(message) and self._admits_author(message)):
            return
        if not self.is_addressed(message, me):
            if self.places.may_be_in_own_thread(message) and not self._enqueue(
                message, lambda: self._answer_in_own_thread(message, me)
            ):
                self._run_soon(message, self._refuse_in_own_thread(message, me))
        elif not self.access.may_write("discord", str(message.author.id)):
            self._run_soon(message, self._refuse(message, TOO_FAST))
        elif not self._enqueue(message, lambda: self._answer(message, me)):
            self._run_soon(message, self._refuse(message, BUSY))

    async def claim_missed(self, message: discord.Message, me: discord.ClientUser, roles: Roles, began: int | None) -> bool:
        """Return whether to answer a message now that may have been missed. One over the limit is never answered.

        `began` is the first message addressed to us in its channel, among those that may have been missed.
        """
        event = make_event_id(message.id)
        if message.id in self._pending or not is_speech(message):
            return False
        follows = self.places.may_be_in_own_thread(message) and began is not None and began < message.id
        if not (follows or self.is_addressed(message, me) or await self.places.is_in_own_thread(message, me)):
            return False
        if not await self.answers.needs_answer(event):
            return False
        if not self.admits(message.author.id, message.channel.id, await roles.find_roles(message.guild, message.author)):
            return False
        if not self.access.may_write("discord", str(message.author.id)):
            await self.dialogue.decline(make_channel_conversation(message), event)
            return False
        return True

    async def queue_missed(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Queue the answer to a missed message as soon as there is room for it."""
        self._pending.add(message.id)
        await self.lanes.put_patiently(
            str(message.channel.id), self._track_pending(message, lambda: self._answer(message, me))
        )

    async def handle_edit(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Update a stored message that its author edited, after earlier work in its channel."""
        at = message.edited_at

        async def edit() -> None:
            text = (await read(message, Markup(message, me))).text
            if text and at is not None:
                await self.dialogue.edit(make_event_id(message.id), text, at)

        if at is not None and is_speech(message) and await self._is_heard(message.id):
            await self.lanes.put_patiently(str(message.channel.id), edit)

    async def handle_deletion(self, channel_id: int, message_id: int) -> None:
        """Forget a deleted message if it is stored, after earlier work in its channel."""
        if await self._is_heard(message_id):
            await self.lanes.put_patiently(str(channel_id), lambda: self.dialogue.delete(make_event_id(message_id)))

    async def handle_reaction(self, event: discord.RawReactionActionEvent) -> None:
        """Record an added or removed reaction as feedback. Ignore neutral emoji and messages that are not ours."""
        at, symbol = now(), event.emoji.name or ""
        kind = self.reactions.classify(symbol)
        if kind is None or (event.member is not None and event.member.bot):
            return
        given = Feedback("", str(event.user_id), kind, symbol, retracts=event.event_type == "REACTION_REMOVE", at=at)
        is_admitted = self.admits(event.user_id, event.channel_id, read_roles(event.member))  # a removal names no roles
        await self.answers.record_reaction(str(event.channel_id), str(event.message_id), given, is_admitted)

    async def handle_reactions_cleared(self, message_id: int, symbol: str | None) -> None:
        """Take back all reactions to a message, or those with one emoji, after a moderator cleared them."""
        turn_id = await self.answers.find_turn_id(str(message_id))
        if turn_id is not None:
            await self.answers.retract_reactions(turn_id, str(message_id), symbol)

    def admits(self, user_id: int, channel_id: int, roles: list[str] | None) -> bool:
        """Return whether a person with these roles (None if unknown: then they may not) may take part in a channel."""
        channel = None if self._client is None else self._client.get_channel(channel_id)
        parent = str(channel.parent_id) if isinstance(channel, discord.Thread) else ""
        return roles is not None and self.access.admits(str(user_id), str(channel_id), roles, parent)

    def is_addressed(self, message: discord.Message, me: discord.ClientUser) -> bool:
        """Return whether a message is addressed to us: directly, by mention, or, if we may read all, as a reply to us."""
        answer = find_reply_target(message) if self.config.message_content else None
        is_reply = answer is not None and answer.author.id == me.id
        return message.guild is None or is_reply or mentions_us(message, me)

    def _admits_author(self, message: discord.Message) -> bool:
        return self.admits(message.author.id, message.channel.id, read_roles(message.author))

    async def _answer_in_own_thread(self, message: discord.Message, me: discord.ClientUser) -> None:
        """Answer a message that does not address us, if its thread is ours."""
        if await self.places.is_in_own_thread(message, me):
            if self.access.may_write("discord", str(message.author.id)):
                await self._answer(message, me)
            else:
                await self._refuse(message, TOO_FAST)

    async def _refuse_in_own_thread(self, message: discord.Message, me: discord.ClientUser) -> None:
        if await self.places.is_in_own_thread(message, me):
            await self._refuse(message, BUSY)

    async def _refuse(self, message: discord.Message, why: str) -> None:
        """Say once why a message gets no answer, now or later."""
        if await self.dialogue.decline(make_channel_conversation(message), make_event_id(message.id)):
            await message.reply(why, mention_author=False)

    async def _answer(self, message: discord.Message, me: discord.ClientUser) -> None:
        markup = Markup(message, me)
        said, quoted = await read(message, markup), find_reply_target(message)
        text = said.text
        is_about_another = quoted is not None and quoted.author.id != me.id and read_words(quoted, markup) != ""
        if not text and not said.unreadable and is_about_another:
            text = f"@{me.display_name}"  # a mention alone is about the message it replies to

        async def ask(options: ReplyOptions) -> Turn:
            question = replace(make_message(message, text), at=now())
            place = await self.places.find_conversation(message)
            await self.dialogue.overhear(place, await self._read_earlier(message, me, place, markup), question.at)
            return await self.dialogue.respond(question, options, place=place)

        if text:
            await self._ask_and_show(message, ask, markup)
        elif message.type != discord.MessageType.thread_starter_message:  # it only repeats another message
            await self._refuse(message, said.refusal)

    async def _read_earlier(
        self, message: discord.Message, me: discord.ClientUser, place: Conversation, markup: Markup
    ) -> list[Message]:
        """Return what a message may be about, said by people who may take part and consent to learning."""
        said = await self.places.find_earlier(message, me, place)
        roles, admitted = Roles(self.access), set[str]()
        for one in said:
            if self.admits(one.author.id, message.channel.id, await roles.find_roles(message.guild, one.author)):
                admitted.add(str(one.author.id))
        read_so = [make_message(one, read_words(one, markup)) for one in said]
        return await self.answers.select_overheard(read_so, admitted.__contains__)

    def _queue_regeneration(self, turn_id: str, interaction: discord.Interaction) -> bool:
        return self.lanes.put(str(interaction.channel_id), lambda: self._regenerate(turn_id, interaction))

    async def _regenerate(self, turn_id: str, interaction: discord.Interaction) -> None:
        user = str(interaction.user.id)
        message, me = interaction.message, interaction.client.user
        if message is not None and me is not None:
            markup = Markup(message, me)
            if (question := find_reply_target(message)) is not None:
                read_words(question, markup)  # for the names in it
            await self._ask_and_show(message, lambda options: self.dialogue.regenerate(turn_id, user, options), markup)

    async def _ask_and_show(
        self, message: discord.Message, ask: Callable[[ReplyOptions], Awaitable[Turn]], markup: Markup
    ) -> None:
        """Show an answer under `message` while it grows, then in full."""
        async with typing(message.channel):
            shown = DiscordAnswer(self.answers, message, new_id(), markup)
            await self.answers.ask_and_show(ask, shown, self.budgets.get_limiter(str(message.channel.id)))

    async def _is_heard(self, message_id: int) -> bool:
        """Return whether a message is stored, or waits to be."""
        if message_id in self._pending:
            return True
        return await self._call(self.dialogue.store.find_message_of_event, make_event_id(message_id)) is not None

    def _enqueue(self, message: discord.Message, work: Work) -> bool:
        """Queue work on a message in its channel's lane. Return False if the lane is full."""
        self._pending.add(message.id)
        if not (is_put := self.lanes.put(str(message.channel.id), self._track_pending(message, work))):
            self._pending.discard(message.id)
        return is_put

    def _track_pending(self, message: discord.Message, work: Work) -> Work:
        async def done() -> None:
            try:
                await work()
            finally:
                self._pending.discard(message.id)

        return done

    def _run_soon(self, message: discord.Message, work: Coroutine[Any, Any, None]) -> None:
        self._pending.add(message.id)
        task = asyncio.ensure_future(work)

        def done(_: Any) -> None:
            self._pending.discard(message.id)
            if not task.cancelled() and (failure := task.exception()) is not None:
                log.warning("message %s could not be refused: %s", message.id, quote_first_line(failure))

        task.add_done_callback(done)


class _Client(discord.Client):
    """discord.py's client, which passes every event to the connector."""

    def __init__(self, connector: Discord):
        intents = discord.Intents.default()
        intents.message_content = connector.config.message_content
        super().__init__(
            intents=intents,
            allowed_mentions=discord.AllowedMentions(everyone=False, users=False, roles=False, replied_user=True),
            proxy=find_proxy(discord.http.Route.BASE),  # discord.py does not look for one
            guild_ready_timeout=READY_SECONDS,
            max_messages=None,  # only the database keeps people's words, where they can be forgotten
        )
        self.connector = connector
        tolerate_bad_messages(self)

    async def close(self) -> None:
        """Close the connection, and end discord.py's wait for further servers, which it leaves behind to fail later."""
        if (waiting := self._connection._ready_task) is not None:
            waiting.cancel()
        await super().close()

    async def setup_hook(self) -> None:
        self.add_dynamic_items(Button)
        tree = discord.app_commands.CommandTree(self)
        for command in COMMANDS:
            tree.add_command(self._make_slash_command(command))
        try:
            await tree.sync()
        except discord.HTTPException as error:
            log.warning("the slash commands could not be registered: %s", error)

    def _make_slash_command(self, command: Command) -> discord.app_commands.Command[Any, Any, None]:
        async def run(interaction: discord.Interaction[Any], choice: str = "") -> None:
            asker = Asker(str(interaction.user.id), str(interaction.channel_id), read_roles(interaction.user))
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
        # Discord replays no events for a new session. (A resumed one does not come here.)
        await reconcile(self.connector, self)

    async def on_message(self, message: discord.Message) -> None:
        if self.user is not None:
            self.connector.handle_message(message, self.user)

    async def on_raw_message_edit(self, event: discord.RawMessageUpdateEvent) -> None:
        if self.user is not None:
            await self.connector.handle_edit(event.message, self.user)

    async def on_raw_message_delete(self, event: discord.RawMessageDeleteEvent) -> None:
        await self.connector.handle_deletion(event.channel_id, event.message_id)

    async def on_raw_bulk_message_delete(self, event: discord.RawBulkMessageDeleteEvent) -> None:
        for message_id in sorted(event.message_ids):
            await self.connector.handle_deletion(event.channel_id, message_id)

    async def on_raw_reaction_add(self, event: discord.RawReactionActionEvent) -> None:
        if self.user is not None and event.user_id != self.user.id:
            await self.connector.handle_reaction(event)

    async def on_raw_reaction_remove(self, event: discord.RawReactionActionEvent) -> None:
        await self.connector.handle_reaction(event)

    async def on_raw_reaction_clear(self, event: discord.RawReactionClearEvent) -> None:
        await self.connector.handle_reactions_cleared(event.message_id, None)

    async def on_raw_reaction_clear_emoji(self, event: discord.RawReactionClearEmojiEvent) -> None:
        await self.connector.handle_reactions_cleared(event.message_id, event.emoji.name)
