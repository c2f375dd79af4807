"""Show on Slack that an answer is being made, and find the answer that Slack's stop button means.

An app is an agent (its manifest has `agent_view`) or an older one with `assistant_view`. An agent has a session in each
thread, with a status and Slack's stop button, and each direct message to it begins a thread; an older app has a status in
its assistant threads. Slack does not say which an app is: it follows from the events that arrive and the calls that Slack
accepts.
"""

import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from aiolimiter import AsyncLimiter
from slack_sdk.web.async_client import AsyncWebClient

from bot.errors import quote_first_line
from connectors.slack.places import Place, read_error_code

log = logging.getLogger(__name__)

STATUSES = 20  # answers a minute with a status; each sets it twice, and Slack allows 50 calls a minute


class SlackSessions:
    """The answers that are being made. `is_agent` is None until it is known."""

    def __init__(self, web: AsyncWebClient):
        self.is_agent: bool | None = None
        self._client = web
        self._growing: dict[Place, str] = {}
        self._budget = AsyncLimiter(STATUSES, 60)

    def find_thread(self, event: dict[str, Any]) -> str:
        """Return the thread of a direct message, "" for none. Each message to an agent begins a thread."""
        if "app_context" in event or "context" in event:  # what the person looks at, sent only to agents
            self.is_agent = True
        return event.get("thread_ts") or (event["ts"] if self.is_agent else "")

    def find_growing_turn(self, channel: str, thread: str) -> str | None:
        """Return the id of the turn that is being made in a thread, or None."""
        found = (turn for place, turn in self._growing.items() if (place.channel, place.thread) == (channel, thread))
        return next(found, None)

    @asynccontextmanager
    async def processing(self, place: Place, turn_id: str) -> AsyncIterator[None]:
        """Show that an answer is being made while the block runs. A refusal by Slack is ignored."""
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
        """Show the status. Return whether there is a session, whose status does not end by itself."""
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
    """Return whether a call succeeds. A failed status must leave nobody without an answer."""
    try:
        await asked
    except Exception as error:  # whatever Slack refuses, or a broken network raises
        log.debug("no status: %s", read_error_code(error) or quote_first_line(error))
        return False
    return True
