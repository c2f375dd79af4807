"""The messages that show one answer on Discord, and their buttons.

An answer is a reply to its question that grows by edits. A long answer continues in further messages, with buttons under
the last part.
"""

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import discord

from bot.errors import ForgottenError
from connectors.answers import SORRY, Answers
from connectors.discord.markup import Markup
from connectors.picks import PICKS
from connectors.splitting import split

LIMIT = 2000  # characters of one message
BUTTONS = {"up": "👍", "down": "👎", "again": "🔄", "stop": "⏹️"}
PICK_ROW = 1  # of the buttons
INVALID_FORM_BODY = 50035  # Discord's code for a request with an invalid field, such as a reply to a message that is gone
TYPING_DELAY = 0.2  # seconds before the typing indicator is shown: most answers appear sooner


@contextlib.asynccontextmanager
async def typing(channel: discord.abc.Messageable) -> AsyncIterator[None]:
    """Show the typing indicator while the block runs, unless it ends soon. Failures of the indicator are ignored."""

    async def type_on() -> None:
        await asyncio.sleep(TYPING_DELAY)
        with contextlib.suppress(discord.HTTPException, aiohttp.ClientError):
            async with channel.typing():
                await asyncio.Event().wait()

    task = asyncio.create_task(type_on())
    try:
        yield
    finally:
        task.cancel()


class DiscordAnswer:
    """The messages that show one answer."""

    def __init__(self, answers: Answers, to: discord.Message, turn_id: str, markup: Markup):
        self.answers, self.question, self.turn_id, self.markup = answers, to, turn_id, markup
        self.messages: list[discord.Message] = []
        self.asks_for_pick = False
        self.is_removed = False  # a moderator deleted one of the messages

    async def show_partial(self, text: str) -> None:
        """Show the beginning of a growing answer."""
        if text.strip():
            await self._show(0, split(self.markup.restore_markup(text), LIMIT)[0].text, ["stop"])

    async def show_final(self, text: str) -> None:
        """Show all parts of the final answer, with the buttons under the last."""
        parts = [part.text for part in split(self.markup.restore_markup(text) or "…", LIMIT) if part.text.strip()] or ["…"]
        buttons = ["up", "down", "again", *(PICKS if self.asks_for_pick else [])]
        for number, part in enumerate(parts):
            await self._show(number, part, buttons if number == len(parts) - 1 else [])

    async def apologize(self, text: str = SORRY) -> None:
        """Say that there will be no answer."""
        await self.question.reply(text, mention_author=False)

    async def _show(self, number: int, text: str, buttons: list[str]) -> None:
        if self.is_removed:
            return
        view = discord.ui.View(timeout=None)
        for act in buttons:
            view.add_item(Button(act, self.turn_id))
        view.stop()  # presses are matched by custom id, also after a restart
        if number < len(self.messages):
            try:
                await self.messages[number].edit(content=text, view=view)
            except discord.NotFound:
                self.is_removed = True
                self.answers.stop(self.turn_id)
            return
        async with self.answers.posting(str(self.question.channel.id)):
            sent = await self._send(number, text, view)
            await self.answers.record_delivery(str(sent.channel.id), str(sent.id), self.turn_id, number)
        self.messages.append(sent)

    async def _send(self, number: int, text: str, view: discord.ui.View) -> discord.Message:
        nonce = hashlib.blake2b(f"{self.turn_id}:{number}".encode(), digest_size=12).hexdigest()
        if number == 0:
            try:
                return await self.question.reply(text, view=view, nonce=nonce, mention_author=True)
            except discord.HTTPException as error:
                if error.code == INVALID_FORM_BODY and "message_reference" in error.text:
                    raise ForgottenError("the question was deleted meanwhile") from error
                raise
        return await self.question.channel.send(text, view=view, nonce=nonce)


class Button(
    discord.ui.DynamicItem[discord.ui.Button[Any]],
    template=rf"kibitz:(?P<act>{'|'.join([*BUTTONS, *PICKS])}):(?P<turn>[0-9a-f-]{{36}})",
):
    """A button whose id names its act and its turn, so that it works after a restart."""

    def __init__(self, act: str, turn_id: str):
        row = PICK_ROW if act in PICKS else 0
        shown = discord.ui.Button[Any](
            emoji=BUTTONS.get(act), label=PICKS.get(act), custom_id=f"kibitz:{act}:{turn_id}", row=row
        )
        super().__init__(shown)
        self.act, self.turn_id = act, turn_id

    @classmethod
    async def from_custom_id(
        cls, interaction: discord.Interaction, item: discord.ui.Item[Any], match: re.Match[str], /
    ) -> "Button":
        """Return the button that was pressed."""
        return cls(match["act"], match["turn"])

    async def callback(self, interaction: discord.Interaction[Any]) -> None:
        """Pass the press to the connector."""
        await interaction.client.connector.interactions.handle_button(self.act, self.turn_id, interaction)
