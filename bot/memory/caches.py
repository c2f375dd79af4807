"""Caches: drops forgotten texts from the memory of a running kibitz (law 10).

Another process may forget something (`kibitz forget`), so it watches the file that records erasures.
"""

import asyncio
import math
from collections.abc import Callable, Collection, Sequence

from bot.memory.recall import Recall
from bot.models.tokenizer import ChatTokenizer
from bot.store.erasures import Erasures

PAUSE_SECONDS = 1.0  # between two checks
COMMIT_SECONDS = 15.0  # from the record of an erasure to its commit, at most: that process may wait for the database's lock


class Caches:
    """The texts in memory: the indexes of recall, the tokenizer's caches, and what `others` forget when they are called."""

    def __init__(
        self, erasures: Erasures, recall: Recall, tokenizer: ChatTokenizer, others: Sequence[Callable[[], None]] = ()
    ):
        self._erasures, self._recall, self._forgets = erasures, recall, [tokenizer.forget_texts, *others]
        self._noted = erasures.count_bytes()
        self._again_at = math.inf

    async def drop_forgotten(self) -> None:
        """Drop all that was forgotten since the last call."""
        noted, clock = self._erasures.count_bytes(), asyncio.get_running_loop().time()
        if noted == self._noted and clock < self._again_at:
            return
        self._again_at = math.inf if noted == self._noted else clock + COMMIT_SECONDS
        await self._recall.drop_forgotten()
        self._forget_texts()
        self._noted = noted

    async def drop(self, message_ids: Collection[str]) -> None:
        """Drop these messages, which are erased."""
        await self._recall.drop(message_ids)
        self._forget_texts()

    def _forget_texts(self) -> None:
        for forget in self._forgets:
            forget()
