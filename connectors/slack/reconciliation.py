"""Catch up, from Slack's API, on what happened while kibitz was not connected.

Slack stops delivering an event after some minutes. Missed messages that are for us are answered, edits are applied, deleted
messages are forgotten, and the reactions to our recent answers are compared with the recorded ones. All this takes the path
of live events, which claims each event once. Places that the app's scopes do not allow reading are skipped.
"""

import logging
from datetime import timedelta
from typing import Any, Protocol

from bot.types import now
from connectors.answers import catch_up_on_messages
from connectors.opinions import ReactionSnapshot
from connectors.slack.places import Place, make_event_id
from connectors.slack.reader import fetch
from connectors.slack.workspace import Workspace

log = logging.getLogger(__name__)

MOST_ANSWERS = 200  # the newest, whose reactions are compared
MOST_MESSAGES = 200  # of each channel or thread, which are read
TOMBSTONE = "tombstone"  # what Slack leaves of a deleted message with replies in its thread


class App(Protocol):
    """The connector that handles live events, as reconciliation uses it."""

    async def claim_missed(self, event: dict[str, Any], team: str) -> bool:
        """Return whether to answer a message now that may have been missed."""

    async def queue_missed(self, event: dict[str, Any], team: str) -> None:
        """Queue the answer to a missed message."""

    async def handle_edit(self, event: dict[str, Any]) -> None:
        """Update a stored message that its author edited."""


async def reconcile(workspace: Workspace, app: App, team: str) -> None:
    """Bring messages and reactions of the last `slack.reconcile_hours` up to date. Log what cannot be read."""
    try:
        await _reconcile(workspace, app, team)
    except Exception:  # a fault here must not end the connection
        log.exception("cannot catch up on what was missed on Slack")


async def _reconcile(workspace: Workspace, app: App, team: str) -> None:
    until = now()  # later events arrive live
    since = until - timedelta(hours=workspace.config.reconcile_hours)
    call, store, answers = workspace.dialogue.store.database.call, workspace.dialogue.store, workspace.answers
    shown = await call(answers.deliveries.read_since, answers.platform, since, MOST_ANSWERS)
    places: dict[str, Place] = {}  # by conversation
    of_turn: dict[str, Place] = {}
    parts: dict[str, list[str]] = {}  # the messages of each turn: a reaction to any of them is an opinion on the turn
    for answer in shown:
        parts.setdefault(answer.turn_id, []).append(answer.message_id)
    for turn_id, messages in parts.items():
        await _reconcile_reactions(workspace, turn_id, messages)
        turn = await call(store.find_turn, turn_id)
        if turn is not None:
            if turn.conversation_id not in places:
                known = await call(store.read_conversation, turn.conversation_id)
                places[turn.conversation_id] = Place(known.channel, known.thread, team)
            of_turn[turn.id] = places[turn.conversation_id]
    window = {"oldest": f"{since.timestamp():.6f}", "latest": f"{until.timestamp():.6f}"}
    listed = await fetch(workspace.client.users_conversations(types="im,public_channel,private_channel", limit=200))
    channels = {place.channel for place in places.values()} | {one["id"] for one in listed.get("channels", [])}
    readable = [Place(channel, "", team) for channel in sorted(channels)]
    readable += [place for place in places.values() if place.thread]
    said: dict[str, dict[str, Any]] = {}  # by event: the first message of a thread is in its channel too
    for place in readable:
        for message in await _fetch_messages(workspace, place, window) or []:
            at = {"channel": place.channel, "thread_ts": message.get("thread_ts") or place.thread}
            said[make_event_id(place.channel, message["ts"])] = {**message, **at}
    asked = await call(store.find_question_events, list(of_turn))
    questions = {event: of_turn[turn_id] for turn_id, event in asked.items()}
    if any(place.is_direct and event == make_event_id(place.channel, place.thread) for event, place in questions.items()):
        workspace.sessions.is_agent = True  # it answered in a thread that a direct message began
    for event, place in questions.items():
        if event not in said and await _is_gone(workspace, place, event.rpartition(":")[-1]):
            await workspace.dialogue.delete(event)  # before an answer can be made from it
    await catch_up_on_messages(
        sorted(said.values(), key=_read_time),
        take=lambda message: app.claim_missed(message, team),
        answer=lambda message: app.queue_missed(message, team),
        edit=lambda message: app.handle_edit({"channel": message["channel"], "message": message}),
    )


async def _fetch_messages(workspace: Workspace, place: Place, window: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the messages in a thread, or else in a channel; None if Slack refuses."""
    wanted = {"channel": place.channel, "limit": MOST_MESSAGES, **window}
    web = workspace.client
    asked = web.conversations_replies(ts=place.thread, **wanted) if place.thread else web.conversations_history(**wanted)
    got = await fetch(asked)
    if "messages" not in got:
        return None
    return [message for message in got["messages"] if message.get("subtype") != TOMBSTONE]


def _read_time(message: dict[str, Any]) -> float:
    """Return when a message was written (seconds since 1970)."""
    return float(message["ts"])


async def _is_gone(workspace: Workspace, place: Place, ts: str) -> bool:
    found = await _fetch_messages(workspace, place, {"oldest": ts, "latest": ts, "inclusive": True})
    return found is not None and ts not in {message["ts"] for message in found}


async def _reconcile_reactions(workspace: Workspace, turn_id: str, messages: list[str]) -> None:
    read_at, there, partial = now(), set(), set()
    for message_id in messages:
        channel, _, ts = message_id.partition(":")
        got = await fetch(workspace.client.reactions_get(channel=channel, timestamp=ts, full=True))
        if "message" not in got:
            return  # a reaction may be on the part that cannot be read
        listed = [
            one for one in got["message"].get("reactions", []) if workspace.reactions.classify(one["name"]) is not None
        ]
        partial |= {one["name"] for one in listed if len(one["users"]) < one.get("count", 0)}
        there |= {(message_id, user, one["name"]) for one in listed for user in one["users"] if user != workspace.reader.me}

    def admits(user: str) -> bool:
        return workspace.access.admits(user, messages[0].partition(":")[0])

    await workspace.answers.reconcile_reactions(turn_id, ReactionSnapshot(messages, there, read_at, partial), admits)
