"""A local Slack server on loopback: the Web API and Socket Mode that slack-bolt uses, with the platform's refusals.

It redelivers events that are not acked in time, sends `app_mention` and `message` for one post, keeps streams as a state
machine, counts rate limits, and keeps messages and their blocks. Tests drive it as people would.
"""

import asyncio
import json
import time
from collections.abc import Collection
from typing import Any

from aiohttp import WSMsgType, web

from connectors.local.slack_state import APP_TOKEN, BOT, BOT_TOKEN, TEAM, SlackState, fill_in


class LocalSlack(SlackState):
    """A Slack server with one workspace and one app."""

    async def start(self) -> None:
        """Listen."""
        app = web.Application()
        app.router.add_route("*", "/api/{method}", self._api)
        app.router.add_get("/link", self._socket)
        app.router.add_get("/files/{id}", self._file)
        app.router.add_post("/respond/{id}", self._respond)
        self._runner = web.AppRunner(app, shutdown_timeout=0.2)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        self.api = f"http://127.0.0.1:{self.port}/api/"

    async def stop(self) -> None:
        """Close everything."""
        for task in self._tasks:
            task.cancel()
        await self._runner.cleanup()

    async def say(
        self,
        channel: str,
        user: str,
        text: str,
        thread: str | None = None,
        repeat: int = 1,
        mention: bool = True,
        **more: Any,
    ) -> str:
        """Write a message as a person. Return its id.

        In a channel (C…) it mentions the bot unless `mention` is False. Each event is delivered `repeat` times. `more`
        holds further fields of the event, such as `subtype` or `files`.
        """
        ts = self.ts()
        event = {"user": user, "text": text, "ts": ts, "channel": channel, "event_ts": ts, "client_msg_id": ts, **more}
        if thread:
            event["thread_ts"] = thread
        if channel.startswith("D"):
            looks_at = {"app_context": {"entities": [{"type": "slack#/types/channel_id", "value": None}]}}
            kinds = [{**event, **(looks_at if self.is_agent else {}), "type": "message", "channel_type": "im"}]
        else:
            event["text"] = f"<@{BOT}> {text}" if mention and f"<@{BOT}" not in text else text
            kinds = [{**event, "type": "app_mention"}, {**event, "type": "message", "channel_type": "channel"}]
        self.said[ts] = event
        self.channels.add(channel)
        for kind in kinds[0 if mention else 1 :] or kinds:
            event_id = f"Ev{next(self.numbers)}"
            await asyncio.gather(*(self.deliver_event(kind, event_id) for _ in range(repeat)))
        return ts

    async def edit(self, channel: str, ts: str, text: str) -> None:
        """Edit a message as its author."""
        before = dict(self.said[ts])
        mention = f"<@{BOT}> " if before["text"].startswith(f"<@{BOT}>") else ""
        self.said[ts] |= {"text": mention + text, "edited": {"user": before["user"], "ts": self.ts()}}
        event = {"type": "message", "subtype": "message_changed", "channel": channel, "hidden": True, "event_ts": self.ts()}
        await self.deliver_event({**event, "message": self.said[ts], "previous_message": before}, f"Ev{next(self.numbers)}")

    async def delete(self, channel: str, ts: str) -> None:
        """Delete a message as its author."""
        event = {"type": "message", "subtype": "message_deleted", "channel": channel, "hidden": True, "event_ts": self.ts()}
        await self.deliver_event(
            {**event, "deleted_ts": ts, "previous_message": self.said.pop(ts)}, f"Ev{next(self.numbers)}"
        )

    async def open_assistant(self, channel: str, user: str) -> str:
        """Open an assistant thread as a person. Return its id."""
        ts = self.ts()
        self.assistants.add(ts)
        thread = {"user_id": user, "channel_id": channel, "thread_ts": ts, "context": {}}
        await self.deliver_event(
            {"type": "assistant_thread_started", "assistant_thread": thread, "event_ts": ts}, f"Ev{next(self.numbers)}"
        )
        return ts

    async def open_messages(self, channel: str, user: str) -> None:
        """Open the tab for talking with an agent as a person."""
        self.channels.add(channel)
        event = {"type": "app_home_opened", "user": user, "channel": channel, "tab": "messages", "event_ts": self.ts()}
        await self.deliver_event({**event, "context": {"entities": None}}, f"Ev{next(self.numbers)}")

    async def look_at(self, channel: str) -> None:
        """Look at a channel as a person while the app is visible. The event does not say who or where they are."""
        entity = {"type": "slack#/types/channel_id", "value": channel, "team_id": TEAM}
        event = {"type": "app_context_changed", "context": {"entities": [entity]}}
        await self.deliver_event(event, f"Ev{next(self.numbers)}")

    async def stop_session(self, channel: str, thread: str, user: str) -> None:
        """Press Slack's own stop button, beside a session that is processing, as a person."""
        assert self.sessions[channel, thread][-1] == "processing"
        streams = [one for one in self.answers(channel, thread) if one["streaming"]]
        for one in streams:
            one["stopped"] = True
        event = {"type": "agent_session_stopped", "channel": channel, "thread_ts": thread, "user": user}
        stopped = {"streaming_message_ts": [one["ts"] for one in streams], "event_ts": self.ts()}
        await self.deliver_event(event | stopped, f"Ev{next(self.numbers)}")

    async def submit(
        self, user: str, view: dict[str, Any], text: str, ticked: Collection[str] | None = None, view_id: str = ""
    ) -> dict[str, Any]:
        """Submit a modal as a person, with boxes `ticked` in place of those that are ticked already. Return the ack."""
        state = {"values": fill_in(view, text, ticked)}
        shown = {**view, "id": view_id or f"V{next(self.numbers)}", "state": state}
        body = {"type": "view_submission", "user": {"id": user}, "team": {"id": TEAM}, "api_app_id": "A1", "view": shown}
        return await self._deliver("interactive", body)

    async def react(self, user: str, message: dict[str, Any], name: str, remove: bool = False, at: str = "") -> None:
        """Add or remove a reaction as a person."""
        item = {"type": "message", "channel": message["channel"], "ts": message["ts"]}
        kind = "reaction_removed" if remove else "reaction_added"
        (self.reactions.discard if remove else self.reactions.add)((message["ts"], user, name))
        event = {"type": kind, "user": user, "reaction": name, "item": item, "event_ts": at or self.ts(), "item_user": BOT}
        await self.deliver_event(event, f"Ev{next(self.numbers)}")

    async def deliver_event(self, event: dict[str, Any], event_id: str) -> None:
        """Deliver an event until it is acked, four times at most."""
        payload = {"type": "event_callback", "team_id": TEAM, "event": event, "event_id": event_id, "event_time": 1}
        payload |= {"api_app_id": "A1", "authorizations": [{"team_id": TEAM, "user_id": BOT, "is_bot": True}]}
        await self._deliver("events_api", payload)

    async def click(self, user: str, message: dict[str, Any], act: str) -> None:
        """Press `up`, `down`, `again`, `stop` or a button of a pick under a message as a person."""
        action = self._action(message, act) | {"action_ts": self.ts(), "block_id": "b"}
        container = {"type": "message", "message_ts": message["ts"], "channel_id": message["channel"]}
        if message.get("thread_ts"):
            container["thread_ts"] = message["thread_ts"]
        body = {
            "type": "block_actions",
            "user": {"id": user, "team_id": TEAM},
            "team": {"id": TEAM},
            "api_app_id": "A1",
            "container": container,
            "channel": {"id": message["channel"]},
            "message": {"ts": message["ts"]},
            "trigger_id": f"t{next(self.numbers)}",
            "actions": [action],
        }
        for _ in range(self.repeats):
            await self._deliver("interactive", body)

    async def use_command(self, user: str, channel: str, name: str, text: str = "") -> str:
        """Use a slash command as a person. Return the reply, which may come long after the ack."""
        found = f"respond{next(self.numbers)}"
        self._command_replies[found] = asyncio.get_running_loop().create_future()
        url = f"http://127.0.0.1:{self.port}/respond/{found}"
        body = {"command": name, "text": text, "user_id": user, "channel_id": channel, "team_id": TEAM, "response_url": url}
        acked = self.acked[name] = await self._deliver("slash_commands", body)
        told = acked.get("payload", {}).get("text")
        return told or await asyncio.wait_for(self._command_replies[found], 300)

    async def disconnect(self) -> None:
        """Close the sockets, as Slack does from time to time."""
        self.connected.clear()
        sockets, self._sockets = self._sockets, []
        for socket in sockets:
            await socket.send_json({"type": "disconnect", "reason": "refresh_requested"})

    def redeliver_unacked(self) -> None:
        """Redeliver events that are not acked yet, without waiting for their time to run out."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(TimeoutError())

    async def _deliver(self, kind: str, payload: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(0 if self.is_dropping_events else 4):
            self.deliveries += 1
            envelope = f"env{next(self.numbers)}"
            self._waiting[envelope] = asyncio.get_running_loop().create_future()
            body = {"envelope_id": envelope, "type": kind, "payload": payload, "accepts_response_payload": True}
            if attempt:
                body |= {"retry_attempt": attempt, "retry_reason": "timeout"}
            await asyncio.wait_for(self.connected.wait(), 300)
            try:
                await self._sockets[-1].send_json(body)
                return await asyncio.wait_for(self._waiting[envelope], self.ack_seconds)
            except (TimeoutError, ConnectionError):
                continue
        assert self.is_dropping_events, f"never acked: {payload}"
        return {}

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_json({"type": "hello", "num_connections": 1, "debug_info": {"approximate_connection_time": 3600}})
        self._sockets.append(socket)
        self.connected.set()
        async for frame in socket:
            if frame.type != WSMsgType.TEXT:
                break
            said = json.loads(frame.data)
            waiting = self._waiting.pop(said.get("envelope_id", ""), None)
            if waiting is not None and not waiting.done():
                waiting.set_result(said)
        if socket in self._sockets:
            self._sockets.remove(socket)
        return socket

    async def _file(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {BOT_TOKEN}":
            return web.Response(status=302, headers={"Location": "/login"})
        return web.Response(body=self.files[request.match_info["id"]].encode())

    async def _respond(self, request: web.Request) -> web.Response:
        self._command_replies[request.match_info["id"]].set_result((await request.json())["text"])
        return web.Response(text="ok")

    async def _api(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        body = await request.json() if request.content_type == "application/json" else dict(await request.post())
        body = {**request.query, **body}
        self.calls.append(method)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ") or body.get("token", "")
        if token != (APP_TOKEN if method == "apps.connections.open" else BOT_TOKEN):
            return web.json_response({"ok": False, "error": "invalid_auth"})
        if method.startswith("chat.") and self.rate_limited > 0:
            self.rate_limited -= 1
            self.met_429 += 1
            return web.json_response({"ok": False, "error": "ratelimited"}, status=429, headers={"Retry-After": "1"})
        for key in ("blocks", "chunks"):
            if isinstance(body.get(key), str):
                body[key] = json.loads(str(body[key]))
        answer = self._call(method, body)
        if method.startswith("chat.") and answer.get("ts") in self.messages:
            self.write_times[answer["ts"]].append(time.monotonic())
            changed = self.change_signals[self.messages[answer["ts"]]["channel"]]
            changed.set()
            changed.clear()
        if "error" in answer and method.startswith("chat."):
            self.refused.append(answer["error"])
        return web.json_response({"ok": "error" not in answer, **answer})

    def _call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = {
            "auth.test": lambda: {
                "user_id": BOT,
                "bot_id": "B1",
                "team_id": TEAM,
                "user": "kibitz",
                "team": "team",
                "url": self.api,
            },
            "apps.connections.open": lambda: {"url": f"ws://127.0.0.1:{self.port}/link?ticket=1"},
            "views.open": lambda: self._open_view(body["view"]),
            "assistant.threads.setStatus": lambda: self._show_status(body),
            "agents.sessions.setStatus": lambda: self._set_session(body),
            "users.info": lambda: self._person(body["user"]),
            "users.conversations": lambda: {"channels": [{"id": one} for one in sorted(self.channels)]},
            "conversations.info": lambda: self._channel(body["channel"]),
            "conversations.history": lambda: self._read(body, threads=False),
            "conversations.replies": lambda: self._read(body, threads=True),
            "reactions.get": lambda: self._reactions(body),
            "chat.postEphemeral": lambda: self._whisper(body),
            "chat.postMessage": lambda: self._refuse(body) or self._new(body, streaming=False, text=self._text(body)),
            "chat.startStream": lambda: self._start_stream(body),
        }
        return asked[method]() if method in asked else self._change(method, body)

    def _open_view(self, view: Any) -> dict[str, Any]:
        view = view if isinstance(view, dict) else json.loads(view)
        elements = [block["element"] for block in view["blocks"] if block["type"] == "input"]
        if len(view["title"]["text"]) > 24 or any(one.get("initial_options") == [] for one in elements):
            return {"error": "invalid_arguments"}
        self.views.put_nowait(view)
        return {"view": {"id": "V1"}}

    def _show_status(self, body: dict[str, Any]) -> dict[str, Any]:
        if body["thread_ts"] not in self.assistants:
            return {"error": "invalid_thread_ts"}
        self.statuses.append(body["status"])
        return {}

    def _set_session(self, body: dict[str, Any]) -> dict[str, Any]:
        if not self.is_agent:
            return {"error": "not_allowed"}
        self.sessions[body["channel_id"], body["thread_ts"]].append(body["status"])
        return {}

    def _whisper(self, body: dict[str, Any]) -> dict[str, Any]:
        self.whispers.append((body["user"], body["text"]))
        return {"message_ts": self.ts()}

    def _person(self, user: str) -> dict[str, Any]:
        known = self.names.get(user)
        profile = {"display_name": known, "real_name": f"{known} Doe"}
        return {"user": {"id": user, "profile": profile}} if known else {"error": "user_not_found"}

    def _channel(self, channel: str) -> dict[str, Any]:
        known = self.names.get(channel)
        return {"channel": {"id": channel, "name": known}} if known else {"error": "channel_not_found"}

    def _start_stream(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.no_streams:
            return {"error": "not_allowed"}
        if not body.get("thread_ts"):
            return {"error": "missing_thread_ts"}
        if not (body.get("recipient_team_id") and body.get("recipient_user_id")):
            return {"error": "missing_recipient"}
        return self._new(body, streaming=True, text=body.get("markdown_text") or "")

    def _change(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        """Change a message for `chat.update`, `chat.appendStream` or `chat.stopStream`. Return the response."""
        message = self.messages.get(body.get("ts", ""))
        if message is None:
            return {"error": "message_not_found"}
        if method == "chat.update":
            if message["streaming"]:
                return {"error": "streaming_state_conflict"}
            message |= {"text": self._text(body), "blocks": body.get("blocks") or []}
            return self._refuse(body) or {"ts": message["ts"], "channel": message["channel"]}
        if not message["streaming"]:
            return {"error": "message_not_in_streaming_state"}
        if message.get("stopped") and method == "chat.appendStream":
            return {"error": "stopped_by_user"}
        message["text"] += body.get("markdown_text") or ""
        if method == "chat.stopStream":
            message |= {"streaming": False, "blocks": body.get("blocks") or []}
        return {"ts": message["ts"], "channel": message["channel"]}
