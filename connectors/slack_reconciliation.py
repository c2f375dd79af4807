"""Reconciliation: what happened on Slack while nobody listened is learned from its API.

Slack delivers an event for some minutes and then no more. Messages that are for us and were not heard are answered, and
the reactions on our recent answers are compared with what we recorded. Both go the ways that live events go, which claim
each event once. What the app's scopes do not let us read is left. It knows no socket.
"""

import logging
from collections.abc import Awaitable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from slack_sdk.errors import SlackApiError

from bot.types import Conversation, now
from connectors.slack_messages import Place, refusal

if TYPE_CHECKING:
    from connectors.slack import Slack

log = logging.getLogger(__name__)

MOST_ANSWERS = 200  # whose reactions are compared, newest first
MOST_MESSAGES = 200  # of one channel or thread that are looked at


async def reconcile(connector: "Slack", me: str, team: str) -> None:
    """Bring messages and reactions of the last `slack.reconcile_hours` up to date; what cannot be read is logged."""
    try:
        await _reconcile(connector, me, team)
    except Exception:  # what is live must not end because of what was missed
        log.exception("what was missed on Slack could not be read")


async def _reconcile(connector: "Slack", me: str, team: str) -> None:
    until = now()  # what comes later is heard
    since = until - timedelta(hours=connector.config.reconcile_hours)
    call, store, answers = connector.dialogue.store.database.call, connector.dialogue.store, connector.answers
    shown = await call(answers.deliveries.since, answers.platform, since, MOST_ANSWERS)
    places: dict[str, Conversation] = {}
    for answer in shown:
        await _reactions(connector, me, answer.message_id, answer.turn_id)
        turn = await call(store.turn, answer.turn_id)
        if turn is not None and turn.conversation_id not in places:
            places[turn.conversation_id] = await call(store.conversation, turn.conversation_id)
    window: dict[str, Any] = {
        "oldest": f"{since.timestamp():.6f}",
        "latest": f"{until.timestamp():.6f}",
        "limit": MOST_MESSAGES,
    }
    listed = await _read(connector.web.users_conversations(types="im,public_channel,private_channel", limit=200))
    channels = {place.channel for place in places.values()} | {one["id"] for one in listed.get("channels", [])}
    for channel in sorted(channels):
        said = await _read(connector.web.conversations_history(channel=channel, **window))
        await _messages(connector, me, channel, "", team, said)
    for place in places.values():
        if place.thread:
            said = await _read(connector.web.conversations_replies(channel=place.channel, ts=place.thread, **window))
            await _messages(connector, me, place.channel, place.thread, team, said)


async def _messages(connector: "Slack", me: str, channel: str, thread: str, team: str, said: dict[str, Any]) -> None:
    direct = channel.startswith("D")
    for message in sorted(said.get("messages", []), key=lambda one: float(one["ts"])):
        mentioned = f"<@{me}>" in message.get("text", "")
        if message.get("subtype") in (None, "file_share") and message.get("user") != me and (direct or mentioned):
            root = message.get("thread_ts") or thread or ("" if direct else message["ts"])
            await connector.missed(Place(channel, root, team), {**message, "channel": channel})


async def _reactions(connector: "Slack", me: str, message_id: str, turn_id: str) -> None:
    channel, _, ts = message_id.partition(":")
    got = await _read(connector.web.reactions_get(channel=channel, timestamp=ts, full=True))
    if "message" in got:
        listed = got["message"].get("reactions", [])
        there = {(user, one["name"]) for one in listed for user in one["users"] if user != me}
        await connector.answers.reconcile(turn_id, {one for one in there if connector.reactions.kind(one[1]) is not None})


async def _read(asked: Awaitable[Any]) -> dict[str, Any]:
    """What Slack answers, or nothing where it refuses."""
    try:
        return dict((await asked).data)
    except SlackApiError as error:
        log.info("not read after downtime: %s", refusal(error))
        return {}
