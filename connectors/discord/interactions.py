"""Handle the buttons under answers on Discord, and the modal that asks why after 👎.

Discord waits 3 seconds for a response. An opinion is committed before it.
"""

from collections.abc import Callable, Collection
from typing import Any

import discord

from bot.store.feedback import find_reasons, select_effective
from bot.types import Feedback, FeedbackKind, Pick, Reason
from connectors import reasons
from connectors.answers import BUSY, NOT_ADMITTED, NOT_RECORDED, NOTED, TAKEN_BACK, Answers
from connectors.discord.roles import read_roles
from connectors.picks import NEWER, PICKS, press_pick

Admits = Callable[[int, int, list[str] | None], bool]  # takes user, channel, roles
QueueRegeneration = Callable[[str, discord.Interaction], bool]  # takes the turn; False if the channel has no room


class DiscordInteractions:
    """The handlers of buttons."""

    def __init__(self, answers: Answers, admits: Admits, queue_regeneration: QueueRegeneration):
        self.answers, self.admits, self.queue_regeneration = answers, admits, queue_regeneration

    async def handle_button(self, act: str, turn_id: str, interaction: discord.Interaction) -> None:
        """Act on a button under an answer."""
        user = interaction.user
        is_admitted = self.admits(user.id, interaction.channel_id or 0, read_roles(user))
        if act in ("up", "down"):
            kind = FeedbackKind.APPROVAL if act == "up" else FeedbackKind.DISAPPROVAL
            await self._toggle_opinion(kind, turn_id, interaction, is_admitted)
        elif act in PICKS:
            pick = Pick(turn_id, str(user.id), act == NEWER, f"discord:{interaction.id}")
            await _whisper(interaction, await press_pick(self.answers, pick, is_admitted))
        elif not is_admitted:
            await _whisper(interaction, NOT_ADMITTED)
        elif act == "stop":
            self.answers.stop(turn_id)
            await interaction.response.defer()
        else:
            await interaction.response.defer()
            if not self.queue_regeneration(turn_id, interaction):
                await interaction.followup.send(BUSY, ephemeral=True)

    async def _toggle_opinion(
        self, kind: FeedbackKind, turn_id: str, interaction: discord.Interaction, is_admitted: bool
    ) -> None:
        """Record 👍 or 👎, or take it back, which whoever gave it always may."""
        user, event = str(interaction.user.id), f"discord:{interaction.id}"
        said = (await self.answers.dialogue.explain(turn_id)).feedback
        again = any((row.user_id, row.kind, row.signal) == (user, kind, "button") for row in select_effective(said))
        if not (is_admitted or again):
            await _whisper(interaction, NOT_ADMITTED)
        elif not await self.answers.record_opinion(
            Feedback(turn_id, user, kind, signal="button", retracts=again, event_id=event)
        ):
            await _whisper(interaction, NOT_RECORDED)
        elif kind == FeedbackKind.DISAPPROVAL and not again:
            await interaction.response.send_modal(ReasonModal(self.answers, turn_id, find_reasons(said, user)))
        else:
            await _whisper(interaction, TAKEN_BACK if again else NOTED)


class ReasonModal(discord.ui.Modal, title=reasons.TITLE):
    """The modal that asks for the reasons for 👎. Those that the person gave before are ticked."""

    def __init__(self, answers: Answers, turn_id: str, standing: Collection[Reason]):
        super().__init__()
        self.answers, self.turn_id = answers, turn_id
        options = [discord.CheckboxGroupOption(label=str(one), default=one in standing) for one in Reason]
        self.boxes: discord.ui.CheckboxGroup[Any] = discord.ui.CheckboxGroup(
            options=options, required=False, min_values=0, max_values=len(options)
        )
        self.comment: discord.ui.TextInput[Any] = discord.ui.TextInput(required=False, max_length=reasons.MOST_CHARACTERS)
        self.add_item(discord.ui.Label(text=reasons.TICK, component=self.boxes))
        self.add_item(discord.ui.Label(text=reasons.COMMENT, component=self.comment))

    async def on_submit(self, interaction: discord.Interaction[Any]) -> None:
        """Record what was ticked and written."""
        user, event = str(interaction.user.id), f"discord:{interaction.id}"
        given = self.boxes.values, self.comment.value
        is_recorded = await reasons.record_reasons(self.answers, self.turn_id, user, *given, event)
        await _whisper(interaction, NOTED if is_recorded else NOT_RECORDED)


async def _whisper(interaction: discord.Interaction[Any], text: str) -> None:
    """Tell the person who pressed or submitted something that nobody else sees."""
    await interaction.response.send_message(text, ephemeral=True)
