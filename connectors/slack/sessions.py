"""SlackSessions: what Slack shows while an answer is being made, and its own way to stop one.

An app is an agent (its manifest has `agent_view`) or an older one with `assistant_view`. An agent has a session in each
thread, with a status and Slack's stop button, and each direct message to it begins a thread; an older app has a status in
its assistant threads. Which it is Slack does not say: it follows from the events that arrive and the calls that Slack
accepts. It knows no conversation and no database.
"""

import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from aiolimiter import AsyncLimiter
from slack_sdk.web.async_client import AsyncWebClient

from connectors.slack.places import Place, read_error_code

log = logging.getLogger(__name__)

STATUSES = 20  # answers a minute that have a status; each is set twice, and Slack takes 50 a minute


class SlackSessions:
    """The answers that are being made. `is_agent` is None as long as nothing tells."""

    def __init__(self, web: AsyncWebClient):
        self.is_agent: bool | None = None
        self._client = web
        self._growing: dict[Place, str] = {}
        self._budget = AsyncLimiter(STATUSES, 60)

    def find_thread(self, event: dict[str, Any]) -> str:
        """Return the thread that a direct message belongs to, "" for none. Each message to an agent begins one."""
        if "app_context" in event or "context" in event:  # what the person looks at; only agents are told
            self.is_agent = True
        return event.get("thread_ts") or (event["ts"] if self.is_agent else "")

    def find_growing_turn(self, channel: str, thread: str) -> str | None:
        """Return the turn that is being made in a thread, if there is one."""
        found = (turn for place, turn in self._growing.items() if (place.channel, place.thread) == (channel, thread))
        return next(found, None)

    @asynccontextmanager
    async def processing(self, place: Place, turn_id: str) -> AsyncIterator[None]:
        """Show that an answer is being made, as long as the block runs; where Slack refuses, no harm done."""
        self._growing[place] = turn_id
        has_session = False
        try:
            if place.thread and self._budget.has_capacity():
                await self._budget.acquire()
                has_session = await self._begin(place)
            yield
        finally:
            self._growing.pop(place, None)
            if has_session:
                await self._set_session(place, "active")

    async def _begin(self, place: Place) -> bool:
        """Show the status; returns whether there is a session, whose status does not end by itself."""
        if self.is_agent is not False and await self._set_session(place, "processing"):
            self.is_agent = True
            return True
        self.is_agent = bool(self.is_agent)
        if place.is_direct and not self.is_agent:
            status = self._client.assistant_threads_setStatus
            await _try_call(status(channel_id=place.channel, thread_ts=place.thread, status="is thinking…"))
        return False

    async def _set_session(self, place: Place, status: str) -> bool:
        return await _try_call(
            self._client.agents_sessions_setStatus(channel_id=place.channel, thread_ts=place.thread, status=status)
        )


async def _try_call(asked: Awaitable[Any]) -> bool:
    """Whether Slack does what it is asked for: nobody is left without an answer because of a status."""
    try:
        await asked
    except Exception as error:  # whatever Slack refuses, or a broken network raises
        log.debug("no status: %s", read_error_code(error) or repr(error))
        return False
    return True
