"""Selection: what chooses one of several answers, as a protocol.

Nothing here knows how answers are judged. The reward head in learning/ implements `Selector`; `bot.chat` asks it before and
after the answers are sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bot.types import Reply, Selection, Turn


@dataclass(frozen=True)
class SamplingPlan:
    """How many answers to sample for a message.

    If `is_plain`, the one answer is a plain sample, drawn as an unbiased control. `why` says why only one is sampled.
    """

    count: int = 1
    is_plain: bool = False
    why: str = ""


class Selector(Protocol):
    """Decides how many answers are sampled for a message, and which of them is given."""

    def plan(self, asker_id: str, most: int) -> SamplingPlan:
        """Return how many answers to sample, from 1 to `most`. It is called for each message, and must do no I/O."""

    async def choose(self, replies: Sequence[Reply], rival: Turn | None = None, asker_id: str = "") -> Selection:
        """Choose one of at least two replies, for the asker if given. The selection's candidates are the replies, in their
        order.

        People will compare the chosen one with the `rival`, if given: then choose one of which that comparison tells most.
        """

    def notice_feedback(self) -> None:
        """Learn that feedback was committed. It must return at once, and refit in the background."""
