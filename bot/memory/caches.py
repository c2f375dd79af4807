"""Caches: what a running kibitz keeps of texts in memory, dropped soon after anything was forgotten (law 10).

Forgetting may be asked for in another process (`kibitz forget`), so the file that notes it is watched. It knows no table.
"""

import asyncio
import math
from collections.abc import Collection

from bot.memory.recall import Recall
from bot.models.tokenizer import ChatTokenizer
from bot.store.erasures import Erasures

PAUSE_SECONDS = 1.0  # between two looks
COMMIT_SECONDS = 15.0  # after a note, until the database has surely forgotten: another process may wait for its lock


class Caches:
    """The index of what may be recalled, and the tokenizer's texts."""

    def __init__(self, erasures: Erasures, recall: Recall, tokenizer: ChatTokenizer):
        self._erasures, self._recall, self._tokenizer = erasures, recall, tokenizer
        self._noted = erasures.count_bytes()
        self._again_at = math.inf

    async def drop_forgotten(self) -> None:
        """Drop what was forgotten since the last look, if anything was."""
        noted, clock = self._erasures.count_bytes(), asyncio.get_running_loop().time()
        if noted == self._noted and clock < self._again_at:
            return
        self._again_at = math.inf if noted == self._noted else clock + COMMIT_SECONDS
        await self._recall.drop_forgotten()
        self._tokenizer.forget_texts()
        self._noted = noted

    async def drop(self, message_ids: Collection[str]) -> None:
        """Drop these messages, which were erased."""
        await self._recall.drop(message_ids)
        self._tokenizer.forget_texts()
