"""A selector that chooses the longest answer, as a reward head would choose the best."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from bot.serving.selection import SamplingPlan
from bot.types import Candidate, Reply, Selection, Turn


@dataclass
class LongestAnswer:
    """Plans with `planned`, or with as many answers as it may. If `error` is set, whatever it is asked raises that.

    `plans` has who asked and the most answers, `choices` the id of the rival with the texts to choose from, of each time.
    """

    planned: SamplingPlan | None = None
    error: Exception | None = None
    plans: list[tuple[str, int]] = field(default_factory=list)
    choices: list[tuple[str | None, list[str]]] = field(default_factory=list)
    noticed: int = 0

    def plan(self, asker_id: str, most: int) -> SamplingPlan:
        self.plans.append((asker_id, most))
        return self.planned or SamplingPlan(most)

    async def choose(self, replies: Sequence[Reply], rival: Turn | None = None, asker_id: str = "") -> Selection:
        self.choices.append((None if rival is None else rival.id, [one.text for one in replies]))
        if self.error is not None:
            raise self.error
        chosen = max(range(len(replies)), key=lambda row: len(replies[row].text))
        candidates = [
            Candidate(text=one.text, is_finished=one.finish_reason == "stop", score=len(one.text), chance=row == chosen)
            for row, one in enumerate(replies)
        ]
        return Selection(head="head-1", chosen=chosen, candidates=candidates, moved={"length": 2.0})

    def notice_feedback(self) -> None:
        self.noticed += 1
        if self.error is not None:
            raise self.error
