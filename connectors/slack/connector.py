"""Answer mentions, direct messages and threads on Slack; turn feedback buttons and reactions into feedback.

Events come through Socket Mode, or by HTTP with Slack's signature checked. An event is committed before it is acked, and
each event has one effect.

Run: ``kibitz serve`` with `[slack] bot_token_env` and `app_token_env` (or `signing_secret_env`) set.
"""

import asyncio
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import aiohttp
from aiohttp import web as http
from slack_bolt.adapter.socket_mode.async_handler import AsyncSocketModeHandler
from slack_bolt.async_app import AsyncApp
from slack_bolt.request.async_request import AsyncBoltRequest
from slack_bolt.response import BoltResponse

from bot.chat.dialogue import ReplyOptions
from bot.config import SlackConfig
from bot.errors import ConfigError, ConnectorError, quote_first_line
from bot.logs import working_on
from bot.types import Conversation, Feedback, Message, StoredMessage, Turn, new_id
from connectors.access import TOO_FAST
from connectors.answers import BUSY, SORRY
from connectors.base import Services, open_listener, sleep_unless_stopped
from connectors.reading import MessageContent
from connectors.slack.interactions import SlackInteractions
from connectors.slack.messages import ask_and_show
from connectors.slack.places import Place, make_event_id, read_error_code
from connectors.slack.reader import SPEECH, fetch
from connectors.slack.reconciliation import reconcile
from connectors.slack.workspace import SLACK, Workspace

log = logging.getLogger(__name__)

DEAD_SECONDS = 60.0  # without a pong, after which the socket is reconnected
API = "https://slack.com/api/"
FATAL_ERRORS = {"invalid_auth", "not_authed", "account_inactive", "token_revoked", "not_allowed_token_type", "missing_scope"}
GREETING = "Hello! Ask me anything; your 👍 and 👎 teach me."


@dataclass(frozen=True)
class Secrets:
    """The app's credentials: for Socket Mode an app-level token, for HTTP a signing secret and a listening socket."""

    bot_token: str
    app_token: str = ""
    signing_secret: str = ""
    listener: socket.socket | None = None

    @classmethod
    def open(cls, config: SlackConfig) -> "Secrets":
        """Read the secrets, and listen for HTTP. Raises ConfigError for a wrong secret or an unavailable address."""
        found = read_secrets(config)
        return replace(found, listener=open_listener("slack", config.host, config.port)) if found.signing_secret else found


def read_secrets(config: SlackConfig) -> Secrets:
    """Read Slack's secrets, without listening. Raises ConfigError if one is not set or of another kind."""
    bot_token = _read_secret("bot_token_env", config.bot_token_env, "xoxb-")
    if not config.signing_secret_env:
        return Secrets(bot_token, _read_secret("app_token_env", config.app_token_env, "xapp-"))
    if config.app_token_env:
        raise ConfigError(
            f"config key slack.signing_secret_env has value '{config.signing_secret_env}' beside slack.app_token_env; "
            "set the first for HTTP or the second for Socket Mode"
        )
    return Secrets(bot_token, signing_secret=_read_secret("signing_secret_env", config.signing_secret_env, ""))


def _read_secret(key: str, variable: str, prefix: str) -> str:
    value = os.environ.get(variable, "").strip() if variable else ""
    if not value:
        raise ConfigError(
            f"config key slack.{key} has value '{variable}', which is not set; set it ({prefix or 'a secret'}…)"
        )
    if not value.startswith(prefix):
        raise ConfigError(f"config key slack.{key}: ${variable} does not begin with {prefix}; put the right token there")
    if not prefix and value.startswith(("xoxb-", "xapp-")):
        raise ConfigError(f"config key slack.{key}: ${variable} holds a token; put the app's signing secret there")
    return value


class Slack:
    """The connector of one app in one workspace."""

    name = SLACK

    def __init__(self, services: Services, config: SlackConfig, secrets: Secrets, api: str = API):
        self.workspace = Workspace(services, config, secrets.bot_token, api)
        # Ack after the handler has committed. (Without a signing secret, bolt would look for one in the environment.)
        self._app = _App(
            client=self.workspace.client, signing_secret=secrets.signing_secret or "none", process_before_response=True
        )
        self._socket = secrets.listener
        self._handler = None if self._socket else AsyncSocketModeHandler(self._app, secrets.app_token)
        self._stopping = asyncio.Event()
        self._register_handlers()

    async def run(self) -> None:
        """Serve until `stop`. Raises ConnectorError if Slack refuses a token or a scope is missing."""
        wait = 5.0
        # One session for all requests: the client would otherwise make a session, and a connection, for each.
        if self.workspace.client.session is not None:  # left by a run that failed
            await self.workspace.client.session.close()
        self.workspace.client.session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.workspace.client.timeout)
        )
        while not self._stopping.is_set():
            try:
                who = await self.workspace.client.auth_test()
                self.workspace.reader.me = who["user_id"]
                async with asyncio.TaskGroup() as group:
                    group.create_task(reconcile(self.workspace, self, who["team_id"]))
                    await (self._serve_socket_mode(self._handler) if self._handler else self._serve_http())
            except Exception as error:  # whatever a broken network raises
                code = read_error_code(error)
                if code in FATAL_ERRORS:
                    raise ConnectorError(
                        f"Slack refuses the app ({code}); check the tokens (config keys slack.bot_token_env, "
                        "slack.app_token_env) and the scopes (docs/slack-manifest.yaml)"
                    ) from error
                log.warning("Slack cannot be reached (%s); again in %.0f s", code or quote_first_line(error), wait)
            await sleep_unless_stopped(self._stopping, wait)
            wait = min(60.0, 2 * wait)

    async def stop(self) -> None:
        """Accept nothing new, let answers end, and close the socket."""
        self._stopping.set()
        if self._handler is not None:
            self._handler.client.auto_reconnect_enabled = False
            await self._handler.client.disconnect()
        await self.workspace.lanes.close(10)
        if self._handler is not None:
            await self._handler.close_async()
        if self.workspace.client.session is not None:
            await self.workspace.client.session.close()

    async def _serve_socket_mode(self, handler: AsyncSocketModeHandler) -> None:
        """Serve in Socket Mode. Reconnect when the socket is silent: a dead socket raises no error."""
        await handler.connect_async()
        client = handler.client
        while not self._stopping.is_set():
            await sleep_unless_stopped(self._stopping, DEAD_SECONDS / 4)
            last = client.last_ping_pong_time
            if last is not None and datetime.now(UTC).timestamp() - last > DEAD_SECONDS and not self._stopping.is_set():
                log.warning("the socket to Slack is silent; connecting again")
                await client.connect_to_new_endpoint(force=True)

    async def _serve_http(self) -> None:
        """Serve by HTTP. bolt checks the signature and the age of each request."""
        app = self._app.web_app("/slack/events")
        app.middlewares.append(_check_timestamp)
        runner = http.AppRunner(app, shutdown_timeout=10)
        await runner.setup()
        try:
            assert self._socket is not None
            await http.SockSite(runner, self._socket).start()
            await self._stopping.wait()
        finally:
            await runner.cleanup()

    def _register_handlers(self) -> None:
        app = self._app
        app.event("app_mention")(self._handle_mention)
        app.event({"type": "message", "subtype": "message_changed"})(self.handle_edit)
        app.event({"type": "message", "subtype": "message_deleted"})(self._handle_deletion)
        app.event("message")(self._handle_message)
        app.event("app_home_opened")(self._handle_home_opened)
        app.event("app_context_changed")(self._handle_context_change)
        app.event("agent_session_stopped")(self._handle_stop)
        app.event("assistant_thread_started")(self._handle_assistant_thread)
        app.event("reaction_added")(self._handle_reaction)
        app.event("reaction_removed")(self._handle_reaction)
        app.event(re.compile(".*"))(_ignore)  # an event without a listener is not acked, and comes again
        SlackInteractions(self.workspace).register_handlers(app)

    async def _handle_mention(self, event: dict[str, Any], body: dict[str, Any], request: AsyncBoltRequest) -> None:
        place = Place(event["channel"], event.get("thread_ts", event["ts"]), body.get("team_id", ""))
        await self._receive(place, event, _read_attempt(request))

    async def _handle_message(self, event: dict[str, Any], body: dict[str, Any], request: AsyncBoltRequest) -> None:
        """Receive a message that is for us without a mention. Mentions arrive as `app_mention`."""
        place = await self._find_place(event, body.get("team_id", ""))
        if place is not None and (place.is_direct or not self.workspace.reader.mentions_us(event)):
            await self._receive(place, event, _read_attempt(request))

    async def _find_place(self, event: dict[str, Any], team: str) -> Place | None:
        """Return the place of a message that is for us, or None if it is not.

        Direct messages and mentions are for us. If `slack.follow_threads` is on, so are messages in a thread where we
        answered an earlier message.
        """
        place = Place(event["channel"], event.get("thread_ts", ""), team)
        if event.get("subtype") not in SPEECH:
            return None
        if place.is_direct:
            return replace(place, thread=self.workspace.sessions.find_thread(event))
        if self.workspace.reader.mentions_us(event):
            return replace(place, thread=place.thread or event["ts"])
        if not (self.workspace.config.follow_threads and place.thread):
            return None
        first = await self.workspace.dialogue.store.database.call(
            self.workspace.answers.deliveries.find_first_question_event, _make_conversation(place)
        )
        return place if first is not None and float(first.rpartition(":")[-1]) < float(event["ts"]) else None

    async def _receive(self, place: Place, event: dict[str, Any], attempt: int) -> None:
        """Commit a message, then queue its answer. `app_mention` and `message` for one post have one effect."""
        if not self._may_talk(event):
            return
        try:
            read = await self.workspace.reader.read(event)
            notice = (
                await self._commit_and_queue(place, event, read) if read.text else await self._decline(place, event, read)
            )
        except Exception:
            if attempt == 1:  # once, and only if the fault outlasts a redelivery
                await self._say_if_possible(place, SORRY)
            raise  # the event is not acked, and comes again
        if notice:
            await self.workspace.say(place, notice)

    async def _commit_and_queue(self, place: Place, event: dict[str, Any], read: MessageContent) -> str:
        """Commit a message and queue its answer. Return why there will be none, or ""."""
        heard = await self._hear(place, event, read)
        if not heard.is_new:
            return ""
        if not self.workspace.access.may_write(self.name, event["user"]):
            notice = TOO_FAST
        elif not self.workspace.lanes.put(heard.place.id, lambda: self._answer(place, heard, event["ts"])):
            notice = BUSY
        else:
            return ""
        await self.workspace.dialogue.forget(heard.message.id)  # so that it is not answered after a restart either
        return notice

    async def _decline(self, place: Place, event: dict[str, Any], read: MessageContent) -> str:
        """Record that a message without words gets no answer. Return the reply to it, "" if it is not for us."""
        is_new = await self.workspace.dialogue.decline(_make_conversation(place), _make_event_id(place, event))
        is_to_us = place.is_direct or self.workspace.reader.mentions_us(event)
        return read.refusal if is_new and is_to_us and self.workspace.access.may_write(self.name, event["user"]) else ""

    async def claim_missed(self, event: dict[str, Any], team: str) -> bool:
        """Return whether to answer a message now that may have been missed. One over the limit is never answered."""
        place = await self._find_place(event, team) if self._may_talk(event) else None
        if place is None or not await self.workspace.answers.needs_answer(_make_event_id(place, event)):
            return False
        if not self.workspace.access.may_write(self.name, event["user"]):
            await self.workspace.dialogue.decline(_make_conversation(place), _make_event_id(place, event))
            return False
        return True

    async def queue_missed(self, event: dict[str, Any], team: str) -> None:
        """Queue the answer to a missed message as soon as there is room for it."""
        place = await self._find_place(event, team)
        if place is None:
            return
        read = await self.workspace.reader.read(event)
        if not read.text:  # too late to say why
            await self.workspace.dialogue.decline(_make_conversation(place), _make_event_id(place, event))
            return
        heard = await self._hear(place, event, read)
        await self.workspace.lanes.put_patiently(heard.place.id, lambda: self._answer(place, heard, event["ts"]))

    def _may_talk(self, event: dict[str, Any]) -> bool:
        own = event.get("bot_id") or event.get("user") in (None, self.workspace.reader.me)
        return not own and self.workspace.access.admits(event["user"], event["channel"])

    async def _hear(self, place: Place, event: dict[str, Any], read: MessageContent) -> StoredMessage:
        name = "" if place.is_direct else await self.workspace.reader.find_name(event["user"])
        said = Message("", event["user"], read.text, author_name=name, event_id=_make_event_id(place, event))
        return await self.workspace.dialogue.hear(_make_conversation(place), said)

    async def _answer(self, place: Place, heard: StoredMessage, ts: str) -> None:
        async def ask(options: ReplyOptions) -> Turn:
            if not place.is_direct and place.thread not in ("", ts):
                await self._overhear(place, ts, heard.message.at)
            return await self.workspace.dialogue.answer(heard, options)

        await ask_and_show(self.workspace, place, heard.message.author_id, ask)

    async def _overhear(self, place: Place, ts: str, until: datetime) -> None:
        """Store what people wrote in a thread before a message, because the message may be about it."""
        written = await self.workspace.reader.read_thread(place, before=ts)
        said = []
        for one in written:
            at, event_id = datetime.fromtimestamp(float(one["ts"]), UTC), _make_event_id(place, one)
            text, name = await self.workspace.reader.read_words(one), await self.workspace.reader.find_name(one["user"])
            said.append(Message("", one["user"], text, author_name=name, event_id=event_id, at=at))
        overheard = await self.workspace.answers.select_overheard(
            said, lambda user: self.workspace.access.admits(user, place.channel)
        )
        await self.workspace.dialogue.overhear(_make_conversation(place), overheard, until)

    async def _handle_assistant_thread(self, event: dict[str, Any]) -> None:
        """Greet a person who opened an assistant thread (of an older app)."""
        thread = event["assistant_thread"]
        if self.workspace.access.admits(thread["user_id"], thread["channel_id"]):
            await self.workspace.say(Place(thread["channel_id"], thread["thread_ts"], ""), GREETING)

    async def _handle_home_opened(self, event: dict[str, Any]) -> None:
        """Greet a person who opened the tab for talking with an agent, if nothing was said there before."""
        if event.get("tab") == "messages":
            self.workspace.sessions.is_agent = True
            if self.workspace.access.admits(event["user"], event["channel"]):
                self.workspace.lanes.put(f"greeting in {event['channel']}", lambda: self._greet(event["channel"]))

    async def _greet(self, channel: str) -> None:
        got = await fetch(self.workspace.client.conversations_history(channel=channel, limit=1))
        if got.get("messages") == []:
            await self.workspace.say(Place(channel, "", ""), GREETING)

    async def _handle_context_change(self) -> None:
        """Note that the app is an agent, because only agents get this event. What the person looks at is ignored."""
        self.workspace.sessions.is_agent = True

    async def _handle_stop(self, event: dict[str, Any]) -> None:
        """Stop the answer for which a person pressed Slack's own stop button."""
        turn_id = self.workspace.sessions.find_growing_turn(event["channel"], event.get("thread_ts", ""))
        if turn_id is not None and self.workspace.access.admits(event["user"], event["channel"]):
            self.workspace.answers.stop(turn_id)

    async def handle_edit(self, event: dict[str, Any]) -> None:
        """Update a stored message that its author edited."""
        now, before = event["message"], event.get("previous_message", {})
        if now.get("edited") and not now.get("bot_id") and now.get("text") != before.get("text"):
            read, at = await self.workspace.reader.read(now), datetime.fromtimestamp(float(now["edited"]["ts"]), UTC)
            if read.text:
                await self.workspace.dialogue.edit(make_event_id(event["channel"], now["ts"]), read.text, at)

    async def _handle_deletion(self, event: dict[str, Any]) -> None:
        """Forget a deleted message if it is stored."""
        await self.workspace.dialogue.delete(make_event_id(event["channel"], event["deleted_ts"]))

    async def _handle_reaction(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        kind = self.workspace.reactions.classify(event["reaction"])
        item = event["item"]
        if kind is None or item.get("type") != "message":
            return
        at = datetime.fromtimestamp(float(event["event_ts"]), UTC)
        removed, name = event["type"] == "reaction_removed", event["reaction"]
        given = Feedback("", event["user"], kind, name, removed, event_id=f"slack:{body['event_id']}", at=at)
        is_admitted = self.workspace.access.admits(event["user"], item["channel"])
        await self.workspace.answers.record_reaction(item["channel"], f"{item['channel']}:{item['ts']}", given, is_admitted)

    async def _say_if_possible(self, place: Place, text: str) -> None:
        try:
            await self.workspace.say(place, text)
        except Exception as error:  # whatever Slack refuses, or a broken network raises
            log.warning("cannot post in %s: %s", place.channel, read_error_code(error) or quote_first_line(error))


class _App(AsyncApp):
    """bolt, with an id in the log for each request."""

    async def async_dispatch(self, req: AsyncBoltRequest) -> BoltResponse:
        """Handle an event, a button or a command. Only events have an id of their own."""
        with working_on(request=f"slack:{req.body.get('event_id') or new_id()}"):
            return await super().async_dispatch(req)


def _make_conversation(place: Place) -> Conversation:
    return Conversation(SLACK, place.channel, place.team, place.thread)


def _make_event_id(place: Place, event: dict[str, Any]) -> str:
    return make_event_id(place.channel, event["ts"])


def _read_attempt(request: AsyncBoltRequest) -> int:
    """Return how often Slack sent an event before."""
    return int(request.headers.get("x-slack-retry-num", ["0"])[0])


@http.middleware
async def _check_timestamp(request: http.Request, handler: Callable[[http.Request], Awaitable[http.StreamResponse]]) -> Any:
    """Refuse a request whose time is not a number: bolt, which checks its age, would fail on it."""
    if not request.headers.get("X-Slack-Request-Timestamp", "").isdecimal():
        raise http.HTTPUnauthorized
    return await handler(request)


async def _ignore() -> None:
    """Ignore an event."""
