"""The state of the local Slack: messages and reactions, and the API's responses about them."""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from aiohttp import web

BOT_TOKEN, APP_TOKEN = "xoxb-fake", "xapp-fake"
TEAM, BOT = "T1", "UBOT"
NUMBERS = itertools.count(1)  # ids are never reused, also if one test run makes several workspaces

LAST = 0  # microseconds of the last id


class SlackState:
    """One workspace, its messages and reactions, and the connection to one app."""

    def __init__(self) -> None:
        self.port = 0
        self.messages: dict[str, dict[str, Any]] = {}
        self.refused: list[str] = []
        self.calls: list[str] = []
        self.acked: dict[str, dict[str, Any]] = {}
        self.deliveries = 0
        self.ack_seconds = 60.0  # Slack: 3
        self.rate_limited = 0  # how many of the next writing calls are answered 429
        self.no_streams = False
        self.repeats = 1  # how often each press of a button is delivered
        self.is_dropping_events = False  # events are delivered to nobody
        self.met_429 = 0
        self.write_times: dict[str, list[float]] = defaultdict(list)  # when the bot wrote or changed each of its messages
        self.change_signals: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by channel
        self.said: dict[str, dict[str, Any]] = {}  # what people wrote
        self.channels: set[str] = set()
        self.reactions: set[tuple[str, str, str]] = set()  # message, user, name
        self.views: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.assistants: set[str] = set()  # threads of assistants
        self.statuses: list[str] = []
        self.is_agent = False  # the app's manifest has agent_view
        self.sessions: dict[tuple[str, str], list[str]] = defaultdict(list)  # the statuses of each thread's session
        self.names: dict[str, str] = {}  # by id of a person or channel
        self.files: dict[str, str] = {}  # contents, by id
        self.whispers: list[tuple[str, str]] = []  # user and text of ephemeral messages
        self._command_replies: dict[str, asyncio.Future[str]] = {}  # replies to a response_url
        self.http_url = ""  # if set, events are posted there, signed; otherwise they go through the socket
        self.connected = asyncio.Event()
        self.numbers = NUMBERS
        self._sockets: list[web.WebSocketResponse] = []
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def ts(self) -> str:
        """Return a new message id: the time in microseconds, never used before."""
        global LAST
        LAST = max(LAST + 1, int(time.time() * 1e6))
        return f"{LAST // 10**6}.{LAST % 10**6:06d}"

    def file(self, name: str, mimetype: str, content: str = "") -> dict[str, Any]:
        """Store a file. Return it as a message's file."""
        found = f"F{next(self.numbers)}"
        self.files[found] = content
        url = f"http://127.0.0.1:{self.port}/files/{found}"
        return {"id": found, "name": name, "mimetype": mimetype, "url_private": url, "size": len(content)}

    def answers(self, channel: str, thread: str | None = None) -> list[dict[str, Any]]:
        """Return the bot's messages in a channel, or in one thread of it, oldest first."""
        found = [one for one in self.messages.values() if one["channel"] == channel]
        return [one for one in found if thread is None or one.get("thread_ts") == thread]

    def is_final(self, message: dict[str, Any]) -> bool:
        """Return whether a message is final, with its feedback buttons."""
        return not message["streaming"] and any(block["type"] == "context_actions" for block in message["blocks"])

    @staticmethod
    def _action(message: dict[str, Any], act: str) -> dict[str, Any]:
        for block in message["blocks"]:
            for element in block.get("elements", []):
                if element["type"] == "feedback_buttons" and act in ("up", "down"):
                    side = "positive_button" if act == "up" else "negative_button"
                    return {"type": "feedback_buttons", "action_id": element["action_id"], "value": element[side]["value"]}
                if element.get("action_id") == act:
                    return {"type": "button", "action_id": act, "value": element["value"]}
        raise AssertionError(f"no button {act}: {message['blocks']}")

    def _new(self, body: dict[str, Any], streaming: bool, text: str) -> dict[str, Any]:
        ts = self.ts()
        kept = {key: body[key] for key in ("channel", "thread_ts") if body.get(key)}
        self.messages[ts] = {**kept, "ts": ts, "text": text, "streaming": streaming, "blocks": body.get("blocks") or []}
        return {"ts": ts, "channel": body["channel"]}

    def _read(self, body: dict[str, Any], threads: bool) -> dict[str, Any]:
        if body["channel"] not in self.channels:
            return {"error": "channel_not_found"}
        everything = [*self.said.values(), *({**one, "user": BOT, "bot_id": "B1"} for one in self.messages.values())]
        here = [one for one in everything if one["channel"] == body["channel"]]
        if threads:
            here = [one for one in here if body["ts"] in (one["ts"], one.get("thread_ts"))]
        else:
            here = [one for one in here if one.get("thread_ts") in (None, one["ts"])]
        oldest, latest = float(body.get("oldest", 0)), float(body.get("latest", "inf"))
        least = oldest if str(body.get("inclusive", "")).lower() in ("1", "true") else oldest + 1e-6
        newest = sorted((one for one in here if least <= float(one["ts"]) <= latest), key=lambda one: one["ts"])
        return {"messages": [{**one, "type": "message"} for one in newest[::-1][: int(body.get("limit", 100))]]}

    def _reactions(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["timestamp"] not in self.messages:
            return {"error": "message_not_found"}
        found = [(user, name) for ts, user, name in self.reactions if ts == body["timestamp"]]
        names = sorted({name for _, name in found})
        users = [sorted(user for user, other in found if other == name) for name in names]
        listed = [{"name": name, "users": by, "count": len(by)} for name, by in zip(names, users, strict=True)]
        return {"type": "message", "message": {"ts": body["timestamp"], "reactions": listed}}

    @staticmethod
    def _text(body: dict[str, Any]) -> str:
        return "".join(one["text"] for one in body.get("blocks") or [] if one["type"] == "markdown") or body["text"]

    @staticmethod
    def _refuse(body: dict[str, Any]) -> dict[str, Any] | None:
        if len(body.get("text", "")) > 4000:
            return {"error": "msg_too_long"}
        if any(len(one["text"]) > 12_000 for one in body.get("blocks") or [] if one["type"] == "markdown"):
            return {"error": "msg_blocks_too_long"}
        return None


def fill_in(view: dict[str, Any], text: str, ticked: Collection[str] | None) -> dict[str, Any]:
    """Return the values that Slack sends for the texts and checkboxes of a modal, by block and action."""
    values: dict[str, Any] = {}
    for block in view["blocks"]:
        field = block["element"]
        sent: dict[str, Any] = {"type": field["type"]}
        if field["type"] == "plain_text_input":
            sent["value"] = text or None
        else:
            options = {one["value"]: one for one in field["options"]}
            before = [one["value"] for one in field.get("initial_options", [])]
            sent["selected_options"] = [options[value] for value in (before if ticked is None else ticked)]
        values[block["block_id"]] = {field["action_id"]: sent}
    return values
