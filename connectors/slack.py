"""Slack, in Socket Mode: mentions and direct messages are answered; feedback buttons and reactions become feedback.

What arrives is committed before Slack is told that we have it, and each event has one effect. Answers in threads are
streamed natively while Slack's limits allow it, others are posted and edited. It knows no model and no training.

Run: ``kibitz serve`` with `[slack] bot_token_env` and `app_token_env` set.
"""

import asyncio
import logging
import os
import re
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from aiolimiter import AsyncLimiter
from slack_bolt.adapter.socket_mode.async_handler import AsyncSocketModeHandler
from slack_bolt.async_app import AsyncApp
from slack_sdk.errors import SlackApiError
from slack_sdk.http_retry.builtin_async_handlers import AsyncRateLimitErrorRetryHandler
from slack_sdk.web.async_client import AsyncWebClient

from bot.config import SlackConfig
from bot.dialogue import ReplyOptions
from bot.errors import ConfigError, ConnectorError, KibitzError
from bot.types import Conversation, Feedback, FeedbackKind, Message, Turn, new_id
from connectors.access import TOO_FAST
from connectors.answers import BUSY, SORRY, Answers
from connectors.base import Lanes, Shared, pause
from connectors.splitting import split
from connectors.streaming import Budgets

log = logging.getLogger(__name__)

LIMIT = 11_000  # characters of one markdown block: 12,000, and some for what is put between
DEAD = 60.0  # seconds without a pong after which the socket is made anew
API = "https://slack.com/api/"
FATAL = {"invalid_auth", "not_authed", "account_inactive", "token_revoked", "not_allowed_token_type", "missing_scope"}


def tokens(config: SlackConfig) -> tuple[str, str]:
    """The bot token and the app-level token. Raises ConfigError where one is not set or is of another kind."""
    found = []
    for key, variable, prefix in (
        ("bot_token_env", config.bot_token_env, "xoxb-"),
        ("app_token_env", config.app_token_env, "xapp-"),
    ):
        value = os.environ.get(variable, "").strip() if variable else ""
        if not value:
            raise ConfigError(f"config key slack.{key} has value '{variable}', which is not set; set it ({prefix}…)")
        if not value.startswith(prefix):
            raise ConfigError(f"config key slack.{key}: ${variable} does not begin with {prefix}; put the right token there")
        found.append(value)
    return found[0], found[1]


def harmless(text: str) -> str:
    """What the model says, with no mention in it that would ring anybody: <!channel>, <@U…>, <#C…>."""
    return re.sub(r"<(?=[!@#])", "<\u200b", text)


class Slack:
    """One app in one workspace."""

    name = "slack"

    def __init__(self, shared: Shared, config: SlackConfig, secrets: tuple[str, str], api: str = API):
        self.dialogue = shared.dialogue
        self.reactions = shared.reactions
        self.access = shared.access
        self.desk = shared.desk
        self.config = config
        self.lanes = Lanes(config.waiting)
        self.budgets = Budgets(config.edits, 60)
        self.streams = AsyncLimiter(config.streams, 60)
        self.answers = Answers(shared.dialogue, shared.deliveries, self.name)
        self.web = AsyncWebClient(token=secrets[0], base_url=api)
        self.web.retry_handlers.append(AsyncRateLimitErrorRetryHandler(max_retry_count=5))
        self._app = AsyncApp(client=self.web, process_before_response=True)  # acked when the handler has committed
        self._handler = AsyncSocketModeHandler(self._app, secrets[1])
        self._stopping = asyncio.Event()
        self._listen()

    async def run(self) -> None:
        """Serve until `stop`. Raises ConnectorError where Slack refuses a token or a scope is missing."""
        wait = 5.0
        while not self._stopping.is_set():
            try:
                await self.web.auth_test()
                await self._handler.connect_async()
                await self._watch()
            except SlackApiError as error:
                reason = error.response.get("error", "")
                if reason in FATAL:
                    raise ConnectorError(
                        f"Slack refuses the app ({reason}); check the tokens (config keys slack.bot_token_env, "
                        "slack.app_token_env) and the scopes (docs/slack-manifest.yaml)"
                    ) from error
                log.warning("Slack cannot be reached (%s); again in %.0f s", reason, wait)
            except Exception as error:  # whatever a broken network raises
                log.warning("Slack cannot be reached (%r); again in %.0f s", error, wait)
            await pause(self._stopping, wait)
            wait = min(60.0, 2 * wait)

    async def stop(self) -> None:
        """Take nothing new in, let answers end, close the socket."""
        self._stopping.set()
        self._handler.client.auto_reconnect_enabled = False
        await self._handler.client.disconnect()
        await self.lanes.close(10)
        await self._handler.close_async()

    async def _watch(self) -> None:
        """Make the socket anew when it is silent: a dead one tells nobody."""
        client = self._handler.client
        while not self._stopping.is_set():
            await pause(self._stopping, DEAD / 4)
            last = client.last_ping_pong_time
            if last is not None and datetime.now(UTC).timestamp() - last > DEAD and not self._stopping.is_set():
                log.warning("the socket to Slack is silent; connecting anew")
                await client.connect_to_new_endpoint(force=True)

    def _listen(self) -> None:
        app = self._app
        app.event("app_mention")(self._mentioned)
        app.event("message")(self._written)
        app.event("reaction_added")(self._reacted)
        app.event("reaction_removed")(self._reacted)
        app.event(re.compile(".*"))(_ignored)  # what has no listener is not acked, and comes again
        app.action(re.compile("opinion|again|stop"))(self._pressed)
        app.command("/kibitz-status")(self._status)
        app.command("/kibitz-why")(self._why)
        app.command("/kibitz-rollback")(self._rollback)

    async def _mentioned(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        thread = event.get("thread_ts", event["ts"])
        await self._heard(event, Conversation("slack", event["channel"], body.get("team_id", ""), thread), thread)

    async def _written(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        if event.get("channel_type") == "im" and event.get("subtype") in (None, "file_share"):
            thread = event.get("thread_ts", "")
            await self._heard(event, Conversation("slack", event["channel"], body.get("team_id", ""), thread), thread)

    async def _heard(self, event: dict[str, Any], conversation: Conversation, thread: str) -> None:
        """Commit a message, then queue its answer. `app_mention` and `message` for one post have one effect."""
        text = re.sub(r"^\s*<@[A-Z0-9]+>\s*", "", event.get("text", "")).strip()
        if event.get("bot_id") or not text or not self.access.admits(event["user"], event["channel"]):
            return
        text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        place = await self.dialogue.open(conversation)
        message = Message(place.id, event["user"], text, event_id=f"slack:{event['channel']}:{event['ts']}")
        if not await self.dialogue.hear(message):
            return
        shown = _Shown(self, event["channel"], thread, event["user"], conversation.space)
        if not self.access.in_time("slack", event["user"]):
            await self._say(event["channel"], thread, TOO_FAST)
        elif not self.lanes.put(
            place.id, lambda: self._give(shown, lambda options: self.dialogue.respond(message, options))
        ):
            await self._say(event["channel"], thread, BUSY)

    async def _reacted(self, event: dict[str, Any], body: dict[str, Any]) -> None:
        kind = self.reactions.kind(event["reaction"])
        item = event["item"]
        if kind is None or item.get("type") != "message" or not self.access.admits(event["user"], item["channel"]):
            return
        turn_id = await self.answers.turn_of(f"{item['channel']}:{item['ts']}")
        if turn_id is not None:
            at = datetime.fromtimestamp(float(event["event_ts"]), UTC)
            removed, name = event["type"] == "reaction_removed", event["reaction"]
            given = Feedback(turn_id, event["user"], kind, name, removed, event_id=f"slack:{body['event_id']}", at=at)
            await self.answers.record(given)

    async def _pressed(self, ack: Any, body: dict[str, Any], action: dict[str, Any]) -> None:
        """A button under an answer. What it says is committed before Slack is told."""
        user, place = body["user"]["id"], body["container"]
        if self.access.admits(user, place["channel_id"]):
            if action["action_id"] == "opinion":
                await self._judged(user, action)
            elif action["action_id"] == "again":
                await self._again(user, place, body["team"]["id"], action["value"])
            else:
                self.answers.stop(action["value"])
        await ack()

    async def _judged(self, user: str, action: dict[str, Any]) -> None:
        """A click on 👍 or 👎. Slack does not say when one is taken back: the last click counts."""
        act, _, turn_id = action["value"].partition(":")
        kind = FeedbackKind.APPROVAL if act == "up" else FeedbackKind.DISAPPROVAL
        event = f"slack:{turn_id}:{user}:{action['action_ts']}"
        await self.answers.record(Feedback(turn_id, user, kind, signal="button", event_id=event))

    async def _again(self, user: str, place: dict[str, Any], team: str, turn_id: str) -> None:
        thread = place.get("thread_ts", "")
        shown = _Shown(self, place["channel_id"], thread, user, team)
        lane = (await self.dialogue.explain(turn_id)).turn.conversation_id

        async def regenerate(options: ReplyOptions) -> Turn:
            return await self.dialogue.regenerate(turn_id, user, options)

        if not self.lanes.put(lane, lambda: self._give(shown, regenerate)):
            await self._say(place["channel_id"], thread, BUSY)

    async def _status(self, ack: Any) -> None:
        await ack(text=await self.desk.status())

    async def _why(self, ack: Any, command: dict[str, Any]) -> None:
        turn_id = await self.answers.last_turn(command["channel_id"])
        await ack(text="There is no answer here yet." if turn_id is None else await self.desk.why(turn_id))

    async def _rollback(self, ack: Any, command: dict[str, Any]) -> None:
        if command["user_id"] not in self.config.operators:
            await ack(text="Only an operator may do that (config key slack.operators).")
            return
        try:
            await ack(text=await self.desk.rollback())
        except KibitzError as error:
            await ack(text=str(error))

    async def _give(self, shown: "_Shown", ask: Callable[[ReplyOptions], Awaitable[Turn]]) -> None:
        await self.answers.give(ask, shown, self.budgets.of(shown.channel))

    async def _say(self, channel: str, thread: str, text: str) -> None:
        await self.web.chat_postMessage(channel=channel, text=text, thread_ts=thread or None)


class _Shown:
    """The messages that show one answer: a native stream in a thread, else a post that is edited."""

    def __init__(self, connector: Slack, channel: str, thread: str, user: str, team: str):
        self.connector, self.channel, self.thread, self.user, self.team = connector, channel, thread, user, team
        self.turn_id = new_id()
        self._ts = ""
        self._streaming = False
        self._sent = ""  # what the stream holds
        self._halted = False  # somebody used Slack's own stop

    async def grow(self, text: str) -> None:
        """Show the beginning of a growing answer."""
        text = harmless(split(text, LIMIT)[0].body)
        if not text.strip():
            return
        if not self._ts:
            await self._begin(text)
        elif self._streaming:
            await self._append(text)
        else:
            await self._edit(text, [self._button("stop", "⏹ Stop")])

    async def whole(self, text: str) -> None:
        """Show the final answer: every part of it, and the buttons under the last."""
        parts = [harmless(part.text) for part in split(text or "…", LIMIT) if part.text.strip()] or ["…"]
        for number, part in enumerate(parts):
            buttons = self._opinions() if number == len(parts) - 1 else []
            if number or not self._ts:
                await self._post(part, buttons, number)
            else:
                await self._finish(part, buttons)

    async def sorry(self) -> None:
        """Say that there will be no answer."""
        await self.connector._say(self.channel, self.thread, SORRY)

    async def _begin(self, text: str) -> None:
        if self.thread and self.connector.streams.has_capacity():
            await self.connector.streams.acquire()
            try:
                sent = await self.connector.web.chat_startStream(
                    channel=self.channel,
                    thread_ts=self.thread,
                    markdown_text=text,
                    recipient_team_id=self.team,
                    recipient_user_id=self.user,
                )
            except SlackApiError as error:
                log.info("no stream (%s); the answer is posted and edited", error.response.get("error"))
            else:
                self._streaming, self._sent = True, text
                await self._deliver(sent["ts"], 0)
                return
        await self._post(text, [self._button("stop", "⏹ Stop")], 0)

    async def _append(self, text: str) -> None:
        more = text[len(self._sent) :]
        if not more or self._halted:
            return
        try:
            await self.connector.web.chat_appendStream(channel=self.channel, ts=self._ts, markdown_text=more)
            self._sent = text
        except SlackApiError as error:
            if error.response.get("error") != "stopped_by_user":
                raise
            self._halted = True
            self.connector.answers.stop(self.turn_id)

    async def _finish(self, text: str, buttons: list[dict[str, Any]]) -> None:
        """End the stream with the rest of the text; where that cannot be, edit what is there."""
        if self._streaming:
            follows = text.startswith(self._sent)
            try:
                await self.connector.web.chat_stopStream(
                    channel=self.channel,
                    ts=self._ts,
                    markdown_text=(text[len(self._sent) :] or None) if follows else None,
                    blocks=buttons,
                )
            except SlackApiError as error:
                log.info("a stream could not be ended (%s); its message is edited", error.response.get("error"))
            else:
                if follows:
                    return
        await self._edit(text, buttons)

    async def _post(self, text: str, buttons: list[dict[str, Any]], part: int) -> None:
        blocks = [{"type": "markdown", "text": text}, *buttons]
        sent = await self.connector.web.chat_postMessage(
            channel=self.channel, text=text[:3000], blocks=blocks, thread_ts=self.thread or None
        )
        await self._deliver(sent["ts"], part)

    async def _edit(self, text: str, buttons: list[dict[str, Any]]) -> None:
        blocks = [{"type": "markdown", "text": text}, *buttons]
        await self.connector.web.chat_update(channel=self.channel, ts=self._ts, text=text[:3000], blocks=blocks)

    async def _deliver(self, ts: str, part: int) -> None:
        if part == 0:
            self._ts = ts
        await self.connector.answers.deliver(self.channel, f"{self.channel}:{ts}", self.turn_id, part)

    def _opinions(self) -> list[dict[str, Any]]:
        """The native feedback buttons, and one to answer again (Slack has no icon for that: `trash` is the only one)."""

        def thumb(symbol: str, act: str, label: str) -> dict[str, Any]:
            text = {"type": "plain_text", "text": symbol}
            return {"text": text, "value": f"{act}:{self.turn_id}", "accessibility_label": label}

        feedback = {
            "type": "feedback_buttons",
            "action_id": "opinion",
            "positive_button": thumb("👍", "up", "Good answer"),
            "negative_button": thumb("👎", "down", "Bad answer"),
        }
        return [{"type": "context_actions", "elements": [feedback]}, self._button("again", "🔄 Answer again")]

    def _button(self, act: str, label: str) -> dict[str, Any]:
        text = {"type": "plain_text", "text": label, "emoji": True}
        button = {"type": "button", "action_id": act, "text": text, "value": self.turn_id}
        return {"type": "actions", "elements": [button]}


async def _ignored() -> None:
    """An event that means nothing to us."""
