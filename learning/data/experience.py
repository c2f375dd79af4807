"""Experience: one thing that a policy may learn, derived from a turn and what people said about it. It knows no database."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bot.types import now
from learning.data.manifest import Row

LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Experience:
    """One answer to learn from, as exact token ids.

    `unit` is what the held-out part is drawn by: an imported conversation, or the words of the question; `question_id`
    is the message that it answers, as others may. `opinions` names those whose opinions the reward is made of, and
    `followup_id` is the message that it counts too. `logprobs` (nats, one for each of `completion_ids`) are those of
    its sampling, or None for a text that was not sampled so (imported, a person's correction, a truncated
    distribution). `rejected_ids` is an answer to the same prompt that people liked less. `feedback_ids` is what the
    reward is made of, and of an answer that is paired also what was said of the other and who ranked either
    (`rank_ids`). `said_at` is when the first of it was said. `advantage` (in [-2, 2]) is what `with_advantages` makes of the
    reward; `weight` (in (0, 1]) is less for those who say more than their share.
    """

    turn_id: str
    unit: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    reward: float
    feedback_ids: tuple[str, ...]
    followup_id: str | None = None
    asker: str = ""
    opinion_holders: tuple[str, ...] = ()
    question: str = ""
    answer: str = ""
    question_id: str = ""
    rejected_ids: tuple[int, ...] | None = None
    is_correction: bool = False
    rank_ids: tuple[str, ...] = ()
    said_at: datetime = LONG_AGO
    advantage: float = 0.0
    weight: float = 1.0

    @property
    def length(self) -> int:
        """How many tokens its longest sequence has."""
        return len(self.prompt_ids) + max(len(self.completion_ids), len(self.rejected_ids or ()))

    def make_manifest_row(self) -> Row:
        """What a manifest records of it."""
        texts = [self.prompt_ids, self.completion_ids, self.rejected_ids]
        ids = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        reward, advantage, weight = (round(value, 6) for value in (self.reward, self.advantage, self.weight))
        return Row(self.turn_id, ids, reward, advantage, weight, list(self.feedback_ids))


@dataclass
class Snapshot:
    """The experiences of one run, in a fixed order, and what was left out under which reason.

    `learned` are those of the training part that the run's objective reads. `rated` are the answers with a reward that were
    read, also those that are too long or too many to train on; `turns` counts all that people said something about, read or
    not. `taken_back` names the turn of each opinion that taught an earlier version and no longer stands. All of it had been
    said by `drawn_at`.
    """

    training: list[Experience] = field(default_factory=list)
    trained_on: list[Experience] = field(default_factory=list)
    held_out: list[Experience] = field(default_factory=list)
    rated: list[Experience] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    without_logprobs: int = 0
    taken_back: list[str] = field(default_factory=list)
    turns: int = 0
    drawn_at: datetime = field(default_factory=now, compare=False)

    @property
    def judged(self) -> list[Experience]:
        """The held-out answers that people liked or disliked: all but corrections, which nobody could dislike."""
        return [one for one in self.held_out if not one.is_correction]

    @property
    def training_and_held_out(self) -> list[Experience]:
        """The training and the held-out part together, oldest first."""
        return sorted([*self.training, *self.held_out], key=lambda one: one.turn_id)

    @property
    def feedback_ids(self) -> list[str]:
        """The feedback that the run learns from, or compares that with: forgetting any of it withdraws what the run made."""
        return sorted({one for experience in self.training for one in experience.feedback_ids})

    @property
    def followup_ids(self) -> list[str]:
        """The messages that followed up on answers, and that the run takes for opinions, in the same way."""
        return sorted({one.followup_id for one in self.training if one.followup_id is not None})
