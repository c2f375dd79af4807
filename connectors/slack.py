"""Slack: mentions, direct messages and assistant threads are answered; feedback buttons and reactions become feedback.

In Socket Mode, or by HTTP with Slack's signature checked. What arrives is committed before Slack is told that we have
it, and each event has one effect. It knows no model and no training.

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
from aiolimiter import AsyncLimiter
from slack_bolt.adapter.socket_mode.async_handler import AsyncSocketModeHandler
from slack_bolt.async_app import AsyncApp
from slack_sdk.errors import SlackApiError
from slack_sdk.http_retry.builtin_async_handlers import AsyncRateLimitErrorRetryHandler
from slack_sdk.web.async_client import AsyncWebClient

from bot.config import SlackConfig
from bot.dialogue import ReplyOptions
from bot.errors import ConfigError, ConnectorError
from bot.types import Conversation, Feedback, FeedbackKind, Heard, Message, Turn
from connectors.access import TOO_FAST
from connectors.answers import BUSY, Answers
from connectors.base import Lanes, Shared, listening, pause
from connectors.commands import COMMANDS, Asker, Commands
from connectors.slack_messages import Place, SlackMessages, event_of, reason, refusal
from connectors.slack_reconciliation import reconcile
from connectors.streaming import Budgets

log = logging.getLogger(__name__)

DEAD = 60.0  # seconds without a pong after which the socket is made anew
API = "https://slack.com/api/"
FATAL = {"invalid_auth", "not_authed", "account_inactive", "token_revoked", "not_allowed_token_type", "missing_scope"}
GREETING = "Hello! Ask me anything; your 👍 and 👎 teach me."


@dataclass(frozen=True)
class Secrets:
    """What Slack knows the app by: for Socket Mode an app-level token, for HTTP a signing secret and our socket."""

    bot_token: str
    app_token: str = ""
    signing_secret: str = ""
    listening_on: socket.socket | None = None

    @classmethod
    def of(cls, config: SlackConfig) -> "Secrets":
        """Raises ConfigError where one is not set or of another kind, or the address of HTTP cannot be had."""
        found = check_secrets(config)
        return replace(found, listening_on=listening("slack", config.host, config.port)) if found.signing_secret else found


def check_secrets(config: SlackConfig) -> Secrets:
    """Read Slack's secrets, without listening. Raises ConfigError where one is not set or of another kind."""
    bot_token = _secret("bot_token_env", config.bot_token_env, "xoxb-")
    if not config.signing_secret_env:
        return Secrets(bot_token, _secret("app_token_env", config.app_token_env, "xapp-"))
    if config.app_token_env:
        raise ConfigError(
            f"config key slack.signing_secret_env has value '{config.signing_secret_env}' beside slack.app_token_env; "
            "set the first for HTTP or the second for Socket Mode"
        )
    return Secrets(bot_token, signing_secret=_secret("signing_secret_env", config.signing_secret_env, ""))


def _secret(key: str, variable: str, prefix: str) -> str:
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
    """One app in one workspace."""

    name = "slack"

    def __init__(self, shared: Shared, config: SlackConfig, secrets: Secrets, api: str = API):
        self.dialogue = shared.dialogue
        self.reactions = shared.reactions
        self.access = shared.access
        self.config = config
        self.lanes = Lanes(config.waiting)
        self.budgets = Budgets(config.edits, 60)
        self.streams = AsyncLimiter(config.streams, 60)
        self.answers = Answers(shared, self.name)
        self.commands = Commands(shared.desk, shared.access, self.answers)
        self.web = AsyncWebClient(token=secrets.bot_token, base_url=api)
        self.web.retry_handlers.append(AsyncRateLimitErrorRetryHandler(max_retry_count=5))
        # Acked when the handler has committed. (bolt would look for a signing secret of its own in the environment.)
        self._app = AsyncApp(client=self.web, signing_secret=secrets.signing_secret or "none", process_before_response=True)
        self._socket = secrets.listening_on
        self._handler = None if self._socket else AsyncSocketModeHandler(self._app, secrets.app_token)
        self._stopping = asyncio.Event()
        self._listen()

    async def run(self) -> None:
        """Serve until `stop`. Raises ConnectorError where Slack refuses a token or a scope is missing."""
        wait = 5.0
        # One for all: the client would else make a session, and a connection, for each request.
        if self.web.session is not None:  # of a run that failed
            await self.web.session.close()
        self.web.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.web.timeout))
        while not self._stopping.is_set():
            try:
                who = await self.web.auth_test()
                async with asyncio.TaskGroup() as group:
                    group.create_task(reconcile(self, who["user_id"], who["team_id"]))
                    await (self._watch(self._handler) if self._handler else self._serve())
            except Exception as error:  # whatever a broken network raises
                code = refusal(error)
                if code in FATAL:
                    raise ConnectorError(
                        f"Slack refuses the app ({code}); check the tokens (config keys slack.bot_token_env, "
                        "slack.app_token_env) and the scopes (docs/slack-manifest.yaml)"
                    ) from error
                log.warning("Slack cannot be reached (%s); again in %.0f s", code or repr(error), wait)
            await pause(self._stopping, wait)
            wait = min(60.0, 2 * wait)

    async def stop(self) -> None:
        """Take nothing new in, let answers end, close the socket."""
        self._stopping.set()
        if self._handler is not None:
            self._handler.client.auto_reconnect_enabled = False
            await self._handler.client.disconnect()
        await self.lanes.close(10)
        if self._handler is not None:
            await self._handler.close_async()
        if self.web.session is not None:
            await self.web.session.close()

    async def _watch(self, handler: AsyncSocketModeHandler) -> None:
        """Serve in Socket Mode; make the socket anew when it is silent: a dead one tells nobody."""
        await handler.connect_async()
        client = handler.client
        while not self._stopping.is_set():
            await pause(self._stopping, DEAD / 4)
            last = client.last_ping_pong_time
            if last is not None and datetime.now(UTC).timestamp() - last > DEAD and not self._stopping.is_set():
                log.warning("the socket to Slack is silent; connecting anew")
                await client.connect_to_new_endpoint(force=True)

    async def _serve(self) -> None:
        """Serve by HTTP; bolt checks the signature and the age of each request."""
        app = self._app.web_app("/slack/events")
        app.middlewares.append(_timely)
        runner = http.AppRunner(app, shutdown_timeout=10)
        await runner.setup()
        try:
            assert self._socket is not None
            await http.SockSite(runner, self._socket).start()
            await self._stopping.wait()
        finally:
            await runner.cleanup()

    def _listen(self) -> None:
        app = self._app
        app.event("app_mention")(self._mentioned)
        app.event({"type": "message", "subtype": "message_changed"})(self._edited)
        app.event({"type": "message", "subtype": "message_deleted"})(self._deleted)
        app.event("message")(self._written)
        app.event("assistant_thread_started")(self._greeted)
        app.event("reaction_added")(self._reacted)
        app.event("reaction_removed")(self._reacted)
        app.event(re.compile(".*"))(_ignored)  # what has no listener is not acked, and comes again
        app.action(re.compile("opinion|again|stop"))(self._pressed)
        app.view("reason")(self._explained)
        for command in COMMANDS:
            app.command(f"/kibitz-{command.name}")(self._commanded)

    async def _mentioned(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        await self._heard(Place(event["channel"], event.get("thread_ts", event["ts"]), body.get("team_id", "")), event)

    async def _written(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        if event.get("channel_type") == "im" and event.get("subtype") in (None, "file_share"):
            await self._heard(Place(event["channel"], event.get("thread_ts", ""), body.get("team_id", "")), event)

    async def _heard(self, place: Place, event: dict[str, Any]) -> None:
        """Commit a message, then queue its answer. `app_mention` and `message` for one post have one effect."""
        if not self._for_us(event):
            return
        heard = await self._hear(place, event)
        if not heard.is_new:
            return
        if not self.access.in_time("slack", event["user"]):
            await self.say(place, TOO_FAST)
        elif not self.lanes.put(heard.place.id, lambda: self._answer(place, heard)):
            await self.say(place, BUSY)

    async def missed(self, place: Place, event: dict[str, Any]) -> None:
        """Have a message answered that may have been missed; of one that has its answer, take over what was changed."""
        if self._for_us(event) and await self.answers.needs_answer(event_of(place.channel, event["ts"])):
            heard = await self._hear(place, event)
            await self.lanes.put_patiently(heard.place.id, lambda: self._answer(place, heard))
        else:
            await self._edited({"channel": place.channel, "message": event})

    def _for_us(self, event: dict[str, Any]) -> bool:
        own = event.get("bot_id") or "user" not in event
        return not own and bool(_plain(event)) and self.access.admits(event["user"], event["channel"])

    async def _hear(self, place: Place, event: dict[str, Any]) -> Heard:
        here = Conversation("slack", place.channel, place.team, place.thread)
        said = Message("", event["user"], _plain(event), event_id=event_of(place.channel, event["ts"]))
        return await self.dialogue.hear(here, said)

    async def _answer(self, place: Place, heard: Heard) -> None:
        if place.is_direct and place.thread:
            await self._think(place)
        await self._give(place, heard.message.author_id, lambda options: self.dialogue.answer(heard, options))

    async def _think(self, place: Place) -> None:
        """Show that an answer is being made, where it is an assistant thread; elsewhere Slack refuses, and no harm done."""
        try:
            await self.web.assistant_threads_setStatus(
                channel_id=place.channel, thread_ts=place.thread, status="is thinking…"
            )
        except SlackApiError as error:
            log.debug("no status in %s: %s", place.channel, refusal(error))

    async def _greeted(self, event: dict[str, Any]) -> None:
        thread = event["assistant_thread"]
        if self.access.admits(thread["user_id"], thread["channel_id"]):
            await self.say(Place(thread["channel_id"], thread["thread_ts"], ""), GREETING)

    async def _edited(self, event: dict[str, Any]) -> None:
        """The author of a message changed it: what we heard of it is changed too."""
        now, before = event["message"], event.get("previous_message", {})
        if now.get("edited") and not now.get("bot_id") and now.get("text") != before.get("text") and _plain(now):
            at = datetime.fromtimestamp(float(now["edited"]["ts"]), UTC)
            await self.dialogue.edit(event_of(event["channel"], now["ts"]), _plain(now), at)

    async def _deleted(self, event: dict[str, Any]) -> None:
        """A message is gone: if we heard it, it is forgotten."""
        await self.dialogue.delete(event_of(event["channel"], event["deleted_ts"]))

    async def _reacted(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        kind = self.reactions.kind(event["reaction"])
        item = event["item"]
        if kind is None or item.get("type") != "message" or not self.access.admits(event["user"], item["channel"]):
            return
        at = datetime.fromtimestamp(float(event["event_ts"]), UTC)
        removed, name = event["type"] == "reaction_removed", event["reaction"]
        given = Feedback("", event["user"], kind, name, removed, event_id=f"slack:{body['event_id']}", at=at)
        await self.answers.reacted(item["channel"], f"{item['channel']}:{item['ts']}", given)

    async def _pressed(self, ack: Any, body: dict[str, Any], action: dict[str, Any]) -> None:
        """A button under an answer. What it says is committed before Slack is told."""
        user, container = body["user"]["id"], body["container"]
        if self.access.admits(user, container["channel_id"]):
            if action["action_id"] == "opinion":
                await self._judged(user, action, body["trigger_id"])
            elif action["action_id"] == "again":
                place = Place(container["channel_id"], container.get("thread_ts", ""), body["team"]["id"])
                await self._again(user, place, action["value"])
            else:
                self.answers.stop(action["value"])
        await ack()

    async def _judged(self, user: str, action: dict[str, Any], trigger: str) -> None:
        """A click on 👍 or 👎. Slack does not say when one is taken back: the last click counts."""
        act, _, turn_id = action["value"].partition(":")
        kind = FeedbackKind.APPROVAL if act == "up" else FeedbackKind.DISAPPROVAL
        event = f"slack:{turn_id}:{user}:{action['action_ts']}"
        await self.answers.record(Feedback(turn_id, user, kind, signal="button", event_id=event))
        if act == "down":
            try:
                await self.web.views_open(trigger_id=trigger, view=reason(turn_id))
            except SlackApiError as error:  # too late, most likely: the opinion is recorded all the same
                log.info("nobody could be asked why: %s", refusal(error))

    async def _explained(self, ack: Any, body: dict[str, Any], view: dict[str, Any]) -> None:
        """Why somebody did not like an answer."""
        said = view["state"]["values"]["reason"]["text"].get("value") or ""
        if said.strip():
            turn_id, user, event = view["private_metadata"], body["user"]["id"], f"slack:{view['id']}"
            given = Feedback(turn_id, user, FeedbackKind.COMMENT, signal="reason", text=said, event_id=event)
            await self.answers.record(given)
        await ack()

    async def _again(self, user: str, place: Place, turn_id: str) -> None:
        lane = (await self.dialogue.explain(turn_id)).turn.conversation_id

        async def regenerate(options: ReplyOptions) -> Turn:
            return await self.dialogue.regenerate(turn_id, user, options)

        if not self.lanes.put(lane, lambda: self._give(place, user, regenerate)):
            await self.say(place, BUSY)

    async def _commanded(self, ack: Any, command: dict[str, Any]) -> None:
        asker = Asker(command["user_id"], command["channel_id"])
        wanted = next(one for one in COMMANDS if command["command"] == f"/kibitz-{one.name}")
        await ack(text=await self.commands.run(wanted, asker, command.get("text", "").strip()))

    async def _give(self, place: Place, user: str, ask: Callable[[ReplyOptions], Awaitable[Turn]]) -> None:
        await self.answers.give(ask, SlackMessages(self, place, user), self.budgets.of(place.channel))

    async def say(self, place: Place, text: str) -> None:
        """Post a text of our own."""
        await self.web.chat_postMessage(channel=place.channel, text=text, thread_ts=place.thread or None)


def _plain(event: dict[str, Any]) -> str:
    """What a message says, without the mention of us and Slack's escapes."""
    text = re.sub(r"^\s*<@[A-Z0-9]+>\s*", "", event.get("text") or "").strip()
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


@http.middleware
async def _timely(request: http.Request, handler: Callable[[http.Request], Awaitable[http.StreamResponse]]) -> Any:
    """bolt checks the age of a request and fails on a time that is no number; that is refused here."""
    if not request.headers.get("X-Slack-Request-Timestamp", "").isdecimal():
        raise http.HTTPUnauthorized
    return await handler(request)


async def _ignored() -> None:
    """An event that means nothing to us."""
