"""A local Discord server on loopback: the gateway and REST API that discord.py uses, with the platform's refusals.

It keeps channels, threads, messages and reactions, hides contents that need the privileged intent, dedupes nonces, counts
rate limits and answers 429, refuses replies to missing messages, replays events on RESUME, and checks interaction deadlines.
Tests drive it as people would.
"""

import asyncio
import json
import time
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

import discord
import yarl
from aiohttp import WSMsgType, web

from connectors.local.discord_state import (
    BOT,
    GUILD,
    MESSAGE_CONTENT,
    OWN_ROLE,
    ROLE,
    SPEECH,
    TOKEN,
    VIA,
    VIEW_CHANNEL,
    DiscordState,
    fill_in,
)


class LocalDiscord(DiscordState):
    """A Discord server with one guild and one bot."""

    async def start(self) -> None:
        """Listen, and point discord.py at this server."""
        app = web.Application()
        app.router.add_get("/gw", self._gateway)
        app.router.add_get("/files/{name}", self._file)
        app.router.add_route("*", "/api/v10/{path:.*}", self._rest)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]
        discord.http.Route.BASE = f"http://127.0.0.1:{self.port}/api/v10"
        discord.Client.before_identify_hook = _no_pause  # type: ignore
        discord.gateway.DiscordWebSocket.DEFAULT_GATEWAY = yarl.URL(f"ws://127.0.0.1:{self.port}/gw")

    async def stop(self) -> None:
        """Close everything."""
        await self._runner.cleanup()

    async def announce_thread(self, thread: int) -> None:
        """Announce a thread to a bot that is connected already."""
        await self.dispatch("THREAD_CREATE", self.channels[thread] | {"newly_created": True})

    async def send_raw(self, channel: int, user: int, content: str, **more: Any) -> int:
        """Send a message with any fields, without hiding its content. Return its id."""
        message = self._message(channel, user, content) | more
        self.messages[int(message["id"])] = message
        await self.dispatch("MESSAGE_CREATE", message | self._make_guild_fields(channel, user))
        return int(message["id"])

    async def say(self, channel: int, user: int, content: str, mention: bool = True, reply_to: int | None = None) -> int:
        """Write a message as a person. In a channel it mentions the bot unless `mention` is False. Return its id."""
        direct = self.channels[channel]["type"] == 1
        mention = mention and not direct
        text = f"<@{BOT}> {content}" if mention else content
        message = self._message(channel, user, text)
        message["mentions"] = [self._user(BOT)] if mention or reply_to else []
        if reply_to:
            message |= {"type": 19, "message_reference": {"message_id": str(reply_to), "channel_id": str(channel)}}
            message["referenced_message"] = self.messages[reply_to]
        shown = dict(message)
        if not (direct or message["mentions"] or self._intents & MESSAGE_CONTENT):
            shown["content"] = ""
        await self.dispatch("MESSAGE_CREATE", shown | self._make_guild_fields(channel, user))
        return int(message["id"])

    async def edit(self, message: int, content: str) -> None:
        """Edit a message as its author."""
        found = self.messages[message]
        mention = f"<@{BOT}> " if found["content"].startswith(f"<@{BOT}>") else ""
        edited = datetime.fromtimestamp(time.time(), UTC).isoformat()
        found |= {"content": mention + content, "edited_timestamp": edited}
        await self.dispatch(
            "MESSAGE_UPDATE", found | self._make_guild_fields(int(found["channel_id"]), int(found["author"]["id"]))
        )

    async def delete(self, message: int) -> None:
        """Delete a message as its author."""
        found = self.messages.pop(message)
        await self.dispatch("MESSAGE_DELETE", {"id": str(message), "channel_id": found["channel_id"]})

    async def react(self, user: int, message: int, emoji: str, remove: bool = False) -> None:
        """Add or remove a reaction as a person."""
        (self.reactions[message].discard if remove else self.reactions[message].add)((user, emoji))
        channel = int(self.messages[message]["channel_id"]) if message in self.messages else next(iter(self.channels))
        event = {
            "user_id": str(user),
            "channel_id": str(channel),
            "message_id": str(message),
            "emoji": {"id": None, "name": emoji},
            "burst": False,
            "type": 0,
        }
        if not remove:
            event |= self._make_guild_fields(channel, user)
        await self.dispatch("MESSAGE_REACTION_REMOVE" if remove else "MESSAGE_REACTION_ADD", event)

    async def add_super_reaction(self, user: int, message: int, emoji: str) -> None:
        """Add a super reaction as a person."""
        self.bursts[message].add((user, emoji))
        channel = int(self.messages[message]["channel_id"])
        event = {"user_id": str(user), "channel_id": str(channel), "message_id": str(message), "burst": True, "type": 1}
        event |= {"emoji": {"id": None, "name": emoji}, "burst_colors": ["#fff"]}
        await self.dispatch("MESSAGE_REACTION_ADD", event | self._make_guild_fields(channel, user))

    async def clear_reactions(self, message: int, emoji: str | None = None) -> None:
        """Clear all reactions, or those with one emoji, as a moderator."""
        self.reactions[message] = {one for one in self.reactions[message] if emoji not in (None, one[1])}
        event = {"channel_id": self.messages[message]["channel_id"], "message_id": str(message)}
        if emoji:
            event["emoji"] = {"id": None, "name": emoji}
        await self.dispatch("MESSAGE_REACTION_REMOVE_EMOJI" if emoji else "MESSAGE_REACTION_REMOVE_ALL", event)

    async def press(self, user: int, message: int, act: str) -> dict[str, Any]:
        """Press the button whose id holds `act` as a person. Return the bot's first response."""
        rows = self.messages[message]["components"]
        button = next(one for row in rows for one in row["components"] if f":{act}:" in one["custom_id"])
        data = {"custom_id": button["custom_id"], "component_type": 2}
        return await self._interact(user, 3, data, message)

    async def submit(
        self, user: int, message: int, modal: dict[str, Any], text: str, ticked: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Submit a modal as a person, with boxes `ticked` in place of those that are ticked already. Return the response."""
        filled = [fill_in(label["component"], text, ticked) for label in modal["components"]]
        labels = [{"type": 18, "id": number, "component": field} for number, field in enumerate(filled)]
        return await self._interact(user, 5, {"custom_id": modal["custom_id"], "components": labels}, message)

    async def use_command(self, user: int, channel: int, name: str, choice: str = "") -> str:
        """Use a slash command as a person. Return the reply that only they see."""
        options = [{"name": "choice", "type": 3, "value": choice}] if choice else []
        first = await self._interact(user, 2, {"id": "1", "name": name, "type": 1, "options": options}, channel=channel)
        assert (first["type"], first["data"]["flags"]) == (5, 64)  # deferred, for the user only
        return (await asyncio.wait_for(self.deferred_replies.get(), 300))["content"]

    async def drop_connection(self, code: int = 4000) -> None:
        """Cut the gateway connection."""
        assert self._socket is not None
        socket, self._socket = self._socket, None
        await socket.close(code=code)

    async def _interact(
        self, user: int, kind: int, data: dict[str, Any], message: int | None = None, channel: int | None = None
    ) -> dict[str, Any]:
        number, token = next(self._ids), f"token-{next(self._ids)}"
        channel = channel or int(self.messages[message or 0]["channel_id"])
        event = {
            "id": str(number),
            "application_id": str(BOT),
            "type": kind,
            "data": data,
            "token": token,
            "version": 1,
            "channel_id": str(channel),
            "channel": self.channels[channel],
            "entitlements": [],
            "authorizing_integration_owners": {},
            "attachment_size_limit": 10_000_000,
        }
        if message is not None:
            event["message"] = self.messages[message]
        who = self._make_guild_fields(channel, user)
        event |= {**who, "member": {**who["member"], "user": self._user(user)}} if who else {"user": self._user(user)}
        self._deadlines[token] = time.monotonic() + self.interaction_seconds
        await self.dispatch("INTERACTION_CREATE", event)
        return await asyncio.wait_for(self.callbacks.get(), 300)

    async def _gateway(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=1 << 22)
        await socket.prepare(request)
        await socket.send_json({"op": 10, "d": {"heartbeat_interval": 41250}})
        async for frame in socket:
            if frame.type != WSMsgType.TEXT:
                break
            said = json.loads(frame.data)
            if said["op"] == 1:
                await socket.send_json({"op": 11})
            elif said["op"] == 2:
                await self._identify(socket, said["d"])
            elif said["op"] == 6:
                await self._resume(socket, said["d"]["seq"])
        return socket

    async def _identify(self, socket: web.WebSocketResponse, said: dict[str, Any]) -> None:
        if said["token"] != TOKEN:
            await socket.close(code=4004)
            return
        if said["intents"] & ~self.allowed_intents:
            await socket.close(code=4014)
            return
        self._socket, self._intents = socket, said["intents"]
        self._events.clear()
        ready = {
            "v": 10,
            "user": self._user(BOT),
            "guilds": [{"id": str(GUILD), "unavailable": True}],
            "session_id": "session",
            "resume_gateway_url": f"ws://127.0.0.1:{self.port}/gw",
            "application": {"id": str(BOT), "flags": 0},
        }
        await self.dispatch("READY", ready)
        shown = [one for one in self.channels.values() if one["type"] == 0]
        roles = [{"id": str(GUILD), "name": "@everyone", "permissions": str(VIEW_CHANNEL), "position": 0, **ROLE}]
        roles += [
            {"id": str(role), "name": f"role{role}", "permissions": "0", "position": 1, **ROLE}
            for role in sorted({role for some in self.roles.values() for role in some})
        ]
        own = {"id": str(OWN_ROLE), "name": "kibitz", "permissions": "0", "position": 1, **ROLE, "managed": True}
        guild = {
            "id": str(GUILD),
            "name": "guild",
            "roles": [*roles, {**own, "tags": {"bot_id": str(BOT)}}],
            "channels": shown,
            "members": [self._member(BOT)],
            "threads": [one for one in self.channels.values() if one["type"] in (11, 12)],
            "emojis": [],
        }
        await self.dispatch("GUILD_CREATE", guild | {"owner_id": "1", "stickers": [], "member_count": 3, "features": []})
        self.identified.set()

    async def _resume(self, socket: web.WebSocketResponse, seen: int) -> None:
        if self.forgets_sessions:
            await socket.send_json({"op": 9, "d": False})
            return
        while seen < len(self._events):  # events dispatched meanwhile come after the missed ones
            await socket.send_json(self._events[seen])
            seen += 1
        self._socket = socket
        await self.dispatch("RESUMED", {})
        self.resumed.set()

    async def _rest(self, request: web.Request) -> web.Response:
        path, method = request.match_info["path"], request.method
        body: Any = {}
        if request.can_read_body:
            if request.content_type == "multipart/form-data":
                body = json.loads(str((await request.post())["payload_json"]))
            else:
                body = await request.json()
        parts = path.split("/")
        if path == "users/@me":
            known = request.headers.get("Authorization") == f"Bot {TOKEN}"
            return self._json(self._user(BOT)) if known else self._json({"message": "401: Unauthorized", "code": 0}, 401)
        if path == "oauth2/applications/@me":
            application = {"id": str(BOT), "name": "kibitz", "description": "", "icon": None, "verify_key": "", "flags": 0}
            return self._json({**application, "bot_public": True, "bot_require_code_grant": False, "owner": self._user(1)})
        if parts[0] == "applications":
            self.commands = [one["name"] for one in body]
            listed = [{**one, "id": str(next(self._ids)), "application_id": str(BOT), "version": "1"} for one in body]
            return self._json(listed)
        if parts[0] == "guilds" and parts[2] == "members":
            return self._json(self._member(int(parts[3])))
        if parts[0] == "channels" and parts[2] == "typing":
            self.typing_calls.append(int(parts[1]))
            return web.Response(status=self.typing_status)
        if parts[0] == "channels" and parts[2] == "messages" and method == "GET":
            return self._read(int(parts[1]), parts[3:], dict(request.query))
        if parts[0] == "channels" and parts[2] == "messages" and method in ("POST", "PATCH"):
            return self._write(int(parts[1]), int(parts[3]) if method == "PATCH" else None, body)
        if parts[0] == "interactions":
            return self._callback(parts[2], body)
        if parts[0] == "webhooks":
            self.deferred_replies.put_nowait(body)
            return self._json(self._message(next(iter(self.channels)), BOT, body.get("content", "")))
        return self._json({"message": "404: Not Found", "code": 0}, 404)

    def _write(self, channel: int, message: int | None, body: dict[str, Any]) -> web.Response:
        now, used = time.monotonic(), self._used[channel]
        used[:] = [one for one in used if one > now - self.window]
        if len(used) >= self.limit:
            self.met_429 += 1
            wait = used[0] + self.window - now
            return self._json(
                {"message": "slow down", "retry_after": wait, "global": False}, 429, {**VIA, "Retry-After": str(wait)}
            )
        used.append(now)
        content = body.get("content") or ""
        bad = None
        if len(content) > 2000 or (message is None and not content.strip()):
            bad = "content"
        elif len(str(body.get("nonce", ""))) > 25:
            bad = "nonce"
        elif "everyone" in body.get("allowed_mentions", {"parse": ["everyone"]}).get("parse", []):
            bad = "allowed_mentions"
        if bad:
            self.refused.append(bad)
            return self._json({"code": 50035, "message": "Invalid Form Body", "errors": {bad: {}}}, 400)
        if message is not None and message not in self.messages:
            return self._json({"message": "Unknown Message", "code": 10008}, 404)
        reference = body.get("message_reference")
        if message is None and reference and reference.get("fail_if_not_exists", True):
            there = self.messages.get(int(reference["message_id"]))
            if there is None or there["type"] not in SPEECH:
                self.refused.append("message_reference")
                wrong = {"_errors": [{"code": "REPLIES_UNKNOWN_MESSAGE", "message": "Unknown message"}]}
                errors = {"message_reference": wrong}
                return self._json({"code": 50035, "message": "Invalid Form Body", "errors": errors}, 400)
        if message is not None:
            found = self.messages[message]
            found |= {key: body[key] for key in ("content", "components") if key in body}
            found["edited_timestamp"] = "2026-01-01T00:00:01+00:00"
            self._note_write(found)
            return self._json(found)
        key = (channel, str(body.get("nonce")))
        if body.get("enforce_nonce") and key in self._nonces:
            return self._json(self.messages[self._nonces[key]])
        made = self._message(channel, BOT, content)
        made["components"] = body.get("components", [])
        self._nonces[key] = int(made["id"])
        if "message_reference" in body:
            answered = str(body["message_reference"]["message_id"])
            made |= {"type": 19, "message_reference": {"message_id": answered, "channel_id": str(channel)}}
            made["referenced_message"] = self.messages.get(int(answered))
        self._note_write(made)
        return self._json(made)

    def _read(self, channel: int, rest: list[str], query: dict[str, str]) -> web.Response:
        if channel not in self.channels:
            return self._json({"message": "Unknown Channel", "code": 10003}, 404)
        if len(rest) == 3:  # who reacted with an emoji
            given = (self.bursts if query.get("type") == "1" else self.reactions)[int(rest[0])]
            people = sorted(user for user, symbol in given if symbol == rest[2] and user not in self.unlisted)
            after = int(query.get("after", 0))
            return self._json([self._user(one) for one in people if one > after])
        if rest:
            if int(rest[0]) not in self.messages:
                return self._json({"message": "Unknown Message", "code": 10008}, 404)
            normal, bursts = self.reactions[int(rest[0])], self.bursts[int(rest[0])]
            listed = []
            for symbol in sorted({symbol for _, symbol in normal | bursts}):
                counts = {
                    "normal": sum(symbol == one for _, one in normal),
                    "burst": sum(symbol == one for _, one in bursts),
                }
                about = {"emoji": {"id": None, "name": symbol}, "count": sum(counts.values()), "count_details": counts}
                listed.append({**about, "me": False, "me_burst": False, "burst_colors": []})
            return self._json({**self.messages[int(rest[0])], "reactions": listed})
        after, before = int(query.get("after", 0)), int(query.get("before", 1 << 63))
        there = sorted(key for key, one in self.messages.items() if one["channel_id"] == str(channel))
        found = [self._hide_content(self.messages[key]) for key in there if after < key < before]
        limit = int(query.get("limit", 50))
        return self._json((found[:limit] if "after" in query else found[-limit:])[::-1])

    async def _file(self, request: web.Request) -> web.Response:
        content = self.files.get(request.match_info["name"])
        return web.Response(status=404) if content is None else web.Response(body=content)

    def _callback(self, token: str, body: dict[str, Any]) -> web.Response:
        if token not in self._deadlines:
            return self._json({"code": 40060, "message": "Interaction has already been acknowledged."}, 400)
        if time.monotonic() > self._deadlines.pop(token):
            return self._json({"code": 10062, "message": "Unknown interaction"}, 404)
        self.callbacks.put_nowait(body)
        return self._json(
            {"interaction": {"id": "1", "type": 3, "response_message_id": None}, "resource": {"type": body["type"]}}
        )

    @staticmethod
    def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
        # discord.py compares the content type with ==, so there must be no charset.
        response = web.Response(body=json.dumps(body).encode(), status=status, headers=headers)
        response.headers["Content-Type"] = "application/json"
        return response


async def _no_pause(client: discord.Client, shard_id: int | None, *, initial: bool = False) -> None:
    """Replace discord.py's hook before a session begins, which waits 5 s if it is not the first."""
