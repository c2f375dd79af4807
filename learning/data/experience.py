"""Experience: one answer that a policy may learn from, derived from a turn and its feedback."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from bot.types import Reason, now
from learning.data.manifest import Row

LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Experience:
    """One answer to learn from, as exact token ids.

    `unit` decides whether it is held out: an imported conversation, or the words of the question. `question_id` is the
    message that it answers; other answers may have the same. `opinion_holders` are the people whose opinions make the
    reward, `asker_voice` is whom the asker counts as among them; `followup_id` is the follow-up that counts too. `logprobs`
    (nats, one per completion token) were recorded at sampling; they are None for a text that was not sampled so (imported, a
    person's correction, a truncated distribution, chosen from several answers). `is_selected` tells that it was chosen so.
    `mean_logprob` (nats per token) is None if no log-probabilities were recorded, or if it is a correction. `is_finished`:
    the answer ended by itself. `reasons` are those that people gave for disliking it. `rejected_ids` is an answer to the
    same prompt that people liked less. `feedback_ids` are the feedback behind the reward; a paired answer also has the
    feedback and the ranks (`rank_ids`) of both answers. `said_at` is the time of the first of it. `advantage` (in [-2, 2])
    is set by `with_advantages`; `weight` (in (0, 1]) is lower for people who say more than their share.
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
    asker_voice: str = ""
    opinion_holders: tuple[str, ...] = ()
    question: str = ""
    answer: str = ""
    question_id: str = ""
    rejected_ids: tuple[int, ...] | None = None
    is_correction: bool = False
    is_selected: bool = False
    mean_logprob: float | None = None
    is_finished: bool = True
    reasons: frozenset[Reason] = frozenset()
    rank_ids: tuple[str, ...] = ()
    said_at: datetime = LONG_AGO
    advantage: float = 0.0
    weight: float = 1.0

    @property
    def length(self) -> int:
        """The number of tokens of its longest sequence."""
        return len(self.prompt_ids) + max(len(self.completion_ids), len(self.rejected_ids or ()))

    def make_manifest_row(self) -> Row:
        """Return the row of the manifest for this experience."""
        texts = [self.prompt_ids, self.completion_ids, self.rejected_ids]
        ids = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        reward, advantage, weight = (round(value, 6) for value in (self.reward, self.advantage, self.weight))
        return Row(self.turn_id, ids, reward, advantage, weight, list(self.feedback_ids))


@dataclass
class Snapshot:
    """The experiences of one run, in a fixed order, and the number of turns that were left out for each reason.

    `trained_on` are the experiences of `training` that the run's objective reads. `rated` are all answers with a reward that
    were read, including those that are too long or too many to train on. `turns` counts all turns with feedback, read or
    not. `taken_back` has the turn of each opinion that taught an earlier version and was retracted since. All feedback is
    from before `drawn_at`.
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
        """The held-out answers that people liked or disliked, without corrections, which nobody could dislike."""
        return [one for one in self.held_out if not one.is_correction]

    @property
    def training_and_held_out(self) -> list[Experience]:
        """The training and the held-out experiences together, oldest first."""
        return sorted([*self.training, *self.held_out], key=lambda one: one.turn_id)

    @property
    def feedback_ids(self) -> list[str]:
        """The ids of the feedback that the run learns from. Forgetting any of it withdraws the version."""
        return sorted({one for experience in self.training for one in experience.feedback_ids})

    @property
    def followup_ids(self) -> list[str]:
        """The ids of the follow-ups that the run learns from. Forgetting any of them withdraws the version."""
        return sorted({one.followup_id for one in self.training if one.followup_id is not None})
