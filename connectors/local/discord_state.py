"""The state of the local Discord: channels, messages, people, and the payloads that describe them."""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from aiohttp import web

TOKEN = "fake.discord.token"
BOT = 1001
GUILD = 2001
OWN_ROLE = 3001  # made by Discord for the bot
MESSAGE_CONTENT = 1 << 15
VIA = {"Via": "1.1 fake"}

VIEW_CHANNEL = 1 << 10  # the permission to view a channel
SPEECH = (0, 19, 20, 21, 23)  # message types that can be replied to
ROLE = {"color": 0, "colors": {"primary_color": 0}, "hoist": False, "managed": False, "mentionable": False, "flags": 0}


class DiscordState:
    """One guild, its channels and messages, and the connection to one bot."""

    def __init__(self) -> None:
        self.port = 0
        self.channels: dict[int, dict[str, Any]] = {}
        self.messages: dict[int, dict[str, Any]] = {}
        self.reactions: dict[int, set[tuple[int, str]]] = defaultdict(set)
        self.bursts: dict[int, set[tuple[int, str]]] = defaultdict(set)  # super reactions
        self.unlisted: set[int] = set()  # people left out of the lists of reactions
        self.roles: dict[int, list[int]] = defaultdict(list)  # by person
        self.files: dict[str, bytes] = {}  # by name
        self.callbacks: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.deferred_replies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # responses that followed a deferred one
        self.commands: list[str] = []
        self.refused: list[str] = []
        self.limit, self.window = 1000, 1.0  # posts and edits in one channel, and the seconds
        self.met_429 = 0
        self.typing_calls: list[int] = []  # channels
        self.typing_status = 204
        self.is_dropping_events = False  # events are delivered to nobody
        self.interaction_seconds = 60.0  # until an interaction must be answered (Discord: 3)
        self.forgets_sessions = False  # a bot that resumes must begin a new session
        self.write_times: dict[str, list[float]] = defaultdict(list)  # when the bot wrote or changed each of its messages
        self.change_signals: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by channel
        self.allowed_intents = ~MESSAGE_CONTENT
        self.identified = asyncio.Event()
        self.resumed = asyncio.Event()
        self._ids = itertools.count((int(time.time() * 1000) - 1420070400000) << 22)
        self._nonces: dict[tuple[int, str], int] = {}
        self._used: dict[int, list[float]] = defaultdict(list)
        self._events: list[dict[str, Any]] = []
        self._socket: web.WebSocketResponse | None = None
        self._intents = 0
        self._deadlines: dict[str, float] = {}

    def channel(self, kind: int = 0) -> int:
        """Make a channel (0 text, 1 direct message, 11 public thread). Return its id."""
        number = next(self._ids)
        made: dict[str, Any] = {"id": str(number), "type": kind, "last_message_id": None}
        if kind == 1:
            made["recipients"] = [self._user(1)]
        else:
            made |= {"name": "somewhere", "position": 0, "permission_overwrites": [], "nsfw": False, "guild_id": str(GUILD)}
        self.channels[number] = made
        return number

    def thread(self, parent: int, owner: int = 1, private: bool = False, starter: int | None = None) -> int:
        """Make a thread. Return its id, which is that of `starter` if it begins at a message."""
        made = self.channels.pop(self.channel(12 if private else 11))
        number = starter or int(made["id"])
        times = {"archive_timestamp": "2026-01-01T00:00:00+00:00", "create_timestamp": "2026-01-01T00:00:00+00:00"}
        about = {"id": str(number), "parent_id": str(parent), "owner_id": str(owner), "name": "a thread", "flags": 0}
        counts = {"message_count": 1, "member_count": 2, "total_message_sent": 1, "rate_limit_per_user": 0}
        state = {"thread_metadata": {**times, "archived": False, "auto_archive_duration": 60, "locked": False}}
        self.channels[number] = made | about | counts | state
        return number

    def file(self, name: str, kind: str, content: bytes = b"") -> dict[str, Any]:
        """Store a file. Return it as an attachment of a message."""
        self.files[name] = content
        url = f"http://127.0.0.1:{self.port}/files/{name}"
        about = {"filename": name, "content_type": kind, "size": len(content), "url": url, "proxy_url": url}
        return {"id": str(next(self._ids)), **about}

    def buttons(self, message: int) -> list[str]:
        """Return the acts of the buttons under a message."""
        return [one["custom_id"].split(":")[1] for row in self.messages[message]["components"] for one in row["components"]]

    def answers(self, channel: int) -> list[dict[str, Any]]:
        """Return the bot's messages in a channel, oldest first."""
        found = [one for one in self.messages.values() if one["channel_id"] == str(channel)]
        return sorted((one for one in found if one["author"]["id"] == str(BOT)), key=lambda one: int(one["id"]))

    async def dispatch(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the bot if it is connected, and keep it for RESUME."""
        event = {"op": 0, "t": name, "s": len(self._events) + 1, "d": data}
        self._events.append(event)
        if self._socket is not None and not self._socket.closed and not self.is_dropping_events:
            await self._socket.send_json(event)

    def _user(self, number: int) -> dict[str, Any]:
        bot = number == BOT
        return {"id": str(number), "username": f"user{number}", "discriminator": "0", "avatar": None, "bot": bot}

    def _make_guild_fields(self, channel: int, user: int) -> dict[str, Any]:
        if self.channels[channel]["type"] == 1:
            return {}
        return {"guild_id": str(GUILD), "member": self._member(user)}

    def _member(self, user: int) -> dict[str, Any]:
        roles = [str(role) for role in ([OWN_ROLE] if user == BOT else self.roles[user])]
        member = {"roles": roles, "joined_at": "2026-01-01T00:00:00+00:00", "deaf": False, "mute": False, "flags": 0}
        return {**member, "user": self._user(user)}

    def _message(self, channel: int, author: int, content: str) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {
            "id": str(number),
            "channel_id": str(channel),
            "author": self._user(author),
            "content": content,
            "timestamp": "2026-01-01T00:00:00+00:00",
            "edited_timestamp": None,
            "tts": False,
            "mention_everyone": False,
            "mentions": [],
            "mention_roles": [],
            "attachments": [],
            "embeds": [],
            "components": [],
            "pinned": False,
            "type": 0,
            "flags": 0,
        }
        self.messages[number] = message
        self.channels[channel]["last_message_id"] = str(number)
        return message

    def _note_write(self, message: dict[str, Any]) -> None:
        self.write_times[message["id"]].append(time.monotonic())
        self.change_signals[message["channel_id"]].set()
        self.change_signals[message["channel_id"]].clear()

    def _hide_content(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message as the API shows it to the bot, without content that its intents do not cover."""
        direct = self.channels[int(message["channel_id"])]["type"] == 1
        to_us = direct or message["mentions"] or message["mention_roles"] or message["author"]["id"] == str(BOT)
        return message if to_us or self._intents & MESSAGE_CONTENT else message | {"content": ""}


def fill_in(field: dict[str, Any], text: str, ticked: Collection[str] | None) -> dict[str, Any]:
    """Return what Discord sends for a text input (type 4) or a checkbox group (22) of a modal."""
    sent = {"type": field["type"], "custom_id": field["custom_id"]}
    if field["type"] == 4:
        return {**sent, "value": text}
    options = {one["value"]: one.get("default", False) for one in field["options"]}
    chosen = [value for value, is_ticked in options.items() if (is_ticked if ticked is None else value in ticked)]
    assert len(options) <= 10
    assert set(ticked or ()) <= options.keys()
    assert field["min_values"] <= len(chosen) <= field["max_values"]
    return {**sent, "values": chosen}
