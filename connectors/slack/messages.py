"""The messages that show one answer on Slack.

In a thread an answer is a native stream, while Slack's limits allow it; otherwise it is a post that is edited. Feedback
buttons stand under the last part.
"""

import logging
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from slack_sdk.errors import SlackApiError

from bot.chat.dialogue import ReplyOptions
from bot.types import Reason, Turn, new_id
from connectors import reasons
from connectors.answers import SORRY
from connectors.picks import PICKS
from connectors.slack.places import Place, read_error_code
from connectors.slack.workspace import Workspace
from connectors.splitting import split

log = logging.getLogger(__name__)

LIMIT = 11_000  # characters of one markdown block; Slack's limit is 12,000, and neutral mentions are longer
Blocks = list[dict[str, Any]]


def neutralize_mentions(text: str) -> str:
    """Return the model's text with mentions that notify nobody: <!channel>, <@U…>, <#C…>."""
    return re.sub(r"<(?=[!@#])", "<\u200b", text)


def make_reason_modal(turn_id: str, standing: Collection[Reason]) -> dict[str, Any]:
    """Return the modal that asks why somebody did not like an answer. The `standing` reasons are ticked."""

    def option(reason: Reason) -> dict[str, Any]:
        return {"text": _plain(str(reason)), "value": str(reason)}

    def question(name: str, label: str, element: dict[str, Any]) -> dict[str, Any]:
        field = {"action_id": name, **element}
        return {"type": "input", "block_id": name, "optional": True, "label": _plain(label), "element": field}

    boxes: dict[str, Any] = {"type": "checkboxes", "options": [option(reason) for reason in Reason]}
    if standing:  # Slack refuses an empty list
        boxes["initial_options"] = [option(reason) for reason in Reason if reason in standing]
    blocks = [
        question("reasons", reasons.TICK, boxes),
        question("comment", reasons.COMMENT, {"type": "plain_text_input", "max_length": reasons.MOST_CHARACTERS}),
    ]
    frame = {"title": _plain(reasons.TITLE), "submit": _plain("Send"), "close": _plain("Skip")}
    return {"type": "modal", "callback_id": "reason", "private_metadata": turn_id, **frame, "blocks": blocks}


def _plain(text: str) -> dict[str, Any]:
    return {"type": "plain_text", "text": text}


class SlackAnswer:
    """The messages that show one answer."""

    def __init__(self, workspace: Workspace, place: Place, user: str):
        self.workspace, self.place, self.user = workspace, place, user
        self.turn_id = new_id()
        self.asks_for_pick = False
        self._ts = ""
        self._streaming = False
        self._sent = ""  # the text in the stream
        self._halted = False  # somebody pressed Slack's own stop button

    async def show_partial(self, text: str) -> None:
        """Show the beginning of a growing answer."""
        text = neutralize_mentions(split(text, LIMIT)[0].body)
        if not text.strip():
            return
        if not self._ts:
            await self._begin(text)
        elif self._streaming:
            await self._append(text)
        else:
            await self._edit(text, [self._buttons({"stop": "⏹ Stop"})])

    async def show_final(self, text: str) -> None:
        """Show all parts of the final answer, with the buttons under the last."""
        parts = [neutralize_mentions(part.text) for part in split(text or "…", LIMIT) if part.text.strip()] or ["…"]
        for number, part in enumerate(parts):
            buttons = self._make_feedback_blocks() if number == len(parts) - 1 else []
            if number or not self._ts:
                await self._post(part, buttons, number)
            else:
                await self._finish(part, buttons)

    async def apologize(self, text: str = SORRY) -> None:
        """Say that there will be no answer."""
        if self._streaming:
            await self._finish(f"{self._sent}\n\n{text}", [])
        else:
            await self.workspace.say(self.place, text)

    async def _begin(self, text: str) -> None:
        if self.place.thread and self.workspace.streams.has_capacity():
            await self.workspace.streams.acquire()
            async with self.workspace.answers.posting(self.place.channel):
                try:
                    sent = await self.workspace.client.chat_startStream(
                        channel=self.place.channel,
                        thread_ts=self.place.thread,
                        markdown_text=text,
                        recipient_team_id=self.place.team,
                        recipient_user_id=self.user,
                    )
                except SlackApiError as error:
                    log.info("no stream (%s); the answer is posted and edited", read_error_code(error))
                else:
                    self._streaming, self._sent = True, text
                    await self._record_delivery(sent["ts"], 0)
                    return
        await self._post(text, [self._buttons({"stop": "⏹ Stop"})], 0)

    async def _append(self, text: str) -> None:
        more = text[len(self._sent) :]
        if not more or self._halted:
            return
        try:
            await self.workspace.client.chat_appendStream(channel=self.place.channel, ts=self._ts, markdown_text=more)
            self._sent = text
        except SlackApiError as error:
            if read_error_code(error) != "stopped_by_user":
                raise
            self._halted = True
            self.workspace.answers.stop(self.turn_id)

    async def _finish(self, text: str, buttons: Blocks) -> None:
        """End the stream with the rest of the text. If that fails, edit the message."""
        if self._streaming:
            follows = text.startswith(self._sent)
            try:
                await self.workspace.client.chat_stopStream(
                    channel=self.place.channel,
                    ts=self._ts,
                    markdown_text=(text[len(self._sent) :] or None) if follows else None,
                    blocks=buttons,
                )
            except SlackApiError as error:
                log.info("cannot end a stream (%s); its message is edited", read_error_code(error))
            else:
                if follows:
                    return
        await self._edit(text, buttons)

    async def _post(self, text: str, buttons: Blocks, part: int) -> None:
        blocks = [{"type": "markdown", "text": text}, *buttons]
        async with self.workspace.answers.posting(self.place.channel):
            sent = await self.workspace.client.chat_postMessage(
                channel=self.place.channel, text=text[:3000], blocks=blocks, thread_ts=self.place.thread or None
            )
            await self._record_delivery(sent["ts"], part)

    async def _edit(self, text: str, buttons: Blocks) -> None:
        blocks = [{"type": "markdown", "text": text}, *buttons]
        await self.workspace.client.chat_update(channel=self.place.channel, ts=self._ts, text=text[:3000], blocks=blocks)

    async def _record_delivery(self, ts: str, part: int) -> None:
        if part == 0:
            self._ts = ts
        channel = self.place.channel
        await self.workspace.answers.record_delivery(channel, f"{channel}:{ts}", self.turn_id, part)

    def _make_feedback_blocks(self) -> Blocks:
        """Return the native feedback buttons, and the others (Slack's only icon for buttons is `trash`)."""

        def thumb(symbol: str, act: str, label: str) -> dict[str, Any]:
            return {"text": _plain(symbol), "value": f"{act}:{self.turn_id}", "accessibility_label": label}

        feedback = {
            "type": "feedback_buttons",
            "action_id": "opinion",
            "positive_button": thumb("👍", "up", "Good answer"),
            "negative_button": thumb("👎", "down", "Bad answer"),
        }
        buttons = {"again": "🔄 Answer again"} | (PICKS if self.asks_for_pick else {})
        return [{"type": "context_actions", "elements": [feedback]}, self._buttons(buttons)]

    def _buttons(self, labels: dict[str, str]) -> dict[str, Any]:
        """Return a row of buttons. `labels` has the text of each act."""
        buttons = [
            {"type": "button", "action_id": act, "text": _plain(label) | {"emoji": True}, "value": self.turn_id}
            for act, label in labels.items()
        ]
        return {"type": "actions", "elements": buttons}


async def ask_and_show(
    workspace: Workspace, place: Place, user: str, ask: Callable[[ReplyOptions], Awaitable[Turn]]
) -> None:
    """Ask for an answer and show it to a person at a place."""
    shown = SlackAnswer(workspace, place, user)
    async with workspace.sessions.processing(place, shown.turn_id):
        await workspace.answers.ask_and_show(ask, shown, workspace.budgets.get_limiter(place.channel))
