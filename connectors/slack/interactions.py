"""Handle the buttons under answers, the modal that asks why, and slash commands.

Slack waits 3 seconds for an ack. A command may take longer, so it is acked first and answered later.
"""

import logging
import re
from typing import Any

from slack_bolt.async_app import AsyncApp
from slack_sdk.errors import SlackApiError

from bot.chat.dialogue import ReplyOptions
from bot.errors import quote_first_line
from bot.store.feedback import find_reasons
from bot.types import Feedback, FeedbackKind, Pick, Turn
from connectors.answers import BUSY, NOT_ADMITTED, NOT_RECORDED, NOTED, SORRY
from connectors.commands import COMMANDS, Asker
from connectors.picks import NEWER, PICKS, press_pick
from connectors.reasons import record_reasons
from connectors.slack.messages import ask_and_show, make_reason_modal
from connectors.slack.places import Place, read_error_code
from connectors.slack.reader import fetch
from connectors.slack.workspace import Workspace

log = logging.getLogger(__name__)


class SlackInteractions:
    """The handlers of buttons, modals and commands."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace

    def register_handlers(self, app: AsyncApp) -> None:
        """Register handlers for the buttons, modals and commands of an app."""
        app.action(re.compile("|".join(["opinion", "again", "stop", *PICKS])))(self._handle_button)
        app.view("reason")(self._handle_reason)
        for command in COMMANDS:
            app.command(f"/kibitz-{command.name}")(self._handle_command)

    async def _handle_command(self, ack: Any, respond: Any, command: dict[str, Any]) -> None:
        asker = Asker(command["user_id"], command["channel_id"])
        wanted = next(one for one in COMMANDS if command["command"] == f"/kibitz-{one.name}")

        async def run() -> None:
            await respond(await self.workspace.commands.run(wanted, asker, command.get("text", "").strip()))

        if self.workspace.lanes.put(f"commands of {asker.user}", run):
            await ack()
        else:
            await ack(text=BUSY)

    async def _handle_button(self, ack: Any, body: dict[str, Any], action: dict[str, Any]) -> None:
        """Act on a button under an answer. An opinion is committed before Slack gets the ack."""
        user, container = body["user"]["id"], body["container"]
        place = Place(container["channel_id"], container.get("thread_ts", ""), body["team"]["id"])
        try:
            notice = await self._perform_action(user, place, action, body["trigger_id"])
        except Exception as error:  # whatever fails: the person gets an apology, operators the reason in one line
            log.error("a button failed: %s", quote_first_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
            notice = SORRY
        if notice:
            self.workspace.lanes.put(f"notices to {user}", lambda: self._whisper(place, user, notice))
        await ack()

    async def _perform_action(self, user: str, place: Place, action: dict[str, Any], trigger: str) -> str:
        """Do what a button says. Return what to tell the person who pressed it, or ""."""
        is_admitted = self.workspace.access.admits(user, place.channel)
        if action["action_id"] in PICKS:
            event = f"slack:{action['value']}:{user}:{action['action_ts']}"
            pick = Pick(action["value"], user, action["action_id"] == NEWER, event)
            return await press_pick(self.workspace.answers, pick, is_admitted)
        if not is_admitted:
            return NOT_ADMITTED
        if action["action_id"] == "opinion":
            return await self._record_opinion(user, action, trigger)
        if action["action_id"] == "again":
            return await self._regenerate(user, place, action["value"])
        self.workspace.answers.stop(action["value"])
        return ""

    async def _record_opinion(self, user: str, action: dict[str, Any], trigger: str) -> str:
        """Record a click on 👍 or 👎. The last click counts, because Slack does not report that one is taken back."""
        act, _, turn_id = action["value"].partition(":")
        kind = FeedbackKind.APPROVAL if act == "up" else FeedbackKind.DISAPPROVAL
        event = f"slack:{turn_id}:{user}:{action['action_ts']}"
        if not await self.workspace.answers.record_opinion(Feedback(turn_id, user, kind, signal="button", event_id=event)):
            return NOT_RECORDED
        if act == "down":
            standing = find_reasons(await self.workspace.answers.read_feedback(turn_id), user)
            try:
                await self.workspace.client.views_open(trigger_id=trigger, view=make_reason_modal(turn_id, standing))
            except SlackApiError as error:  # too late, most likely; the opinion is recorded anyway
                log.info("cannot ask for the reason of a 👎: %s", read_error_code(error))
        return NOTED

    async def _regenerate(self, user: str, place: Place, turn_id: str) -> str:
        lane = (await self.workspace.dialogue.explain(turn_id)).turn.conversation_id

        async def regenerate(options: ReplyOptions) -> Turn:
            return await self.workspace.dialogue.regenerate(turn_id, user, options)

        return "" if self.workspace.lanes.put(lane, lambda: ask_and_show(self.workspace, place, user, regenerate)) else BUSY

    async def _handle_reason(self, ack: Any, body: dict[str, Any], view: dict[str, Any]) -> None:
        """Record why somebody did not like an answer. If that is over a limit, say so in the modal, which stays open."""
        turn_id, user, event = view["private_metadata"], body["user"]["id"], f"slack:{view['id']}"
        boxes, comment = (view["state"]["values"][name][name] for name in ("reasons", "comment"))
        ticked = [option["value"] for option in boxes.get("selected_options") or []]
        given = ticked, comment.get("value") or ""
        if await record_reasons(self.workspace.answers, turn_id, user, *given, event):
            await ack()
        else:
            await ack(response_action="errors", errors={"reasons": NOT_RECORDED})

    async def _whisper(self, place: Place, user: str, text: str) -> None:
        """Tell one person something that nobody else sees."""
        whispered = self.workspace.client.chat_postEphemeral
        await fetch(whispered(channel=place.channel, user=user, text=text, thread_ts=place.thread or None))
