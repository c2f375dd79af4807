"""Metrics of a run: all figures that it leaves, in `metrics.json` and in the record of its version.

They are JSON in both places, flat, under the keys that these records name. What a version of kibitz did not measure yet has
its default when it is read.
"""

from dataclasses import dataclass

from pydantic import Field

from bot.types import Record
from learning.judging.evaluation import Manner
from learning.judging.gate import Evidence, VerdictMetrics
from learning.judging.off_policy import Estimate
from learning.judging.statistics import Interval


@dataclass(frozen=True)
class Health:
    """How a policy is: nats a token of held-out liked answers (None without any), KL to the base, well-formed samples; and
    what liked over disliked held-out answers gained since the run began, with its 95% interval (None without both).
    `liked_error` is the standard error of what liked answers changed since then: there are few of them.
    """

    liked: float | None
    kl: float
    well_formed: int
    samples: int
    gained: Interval | None = None
    liked_error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Check(Health):
    """How a policy was after a step of a run."""

    step: int


def _trl(key: str) -> float:
    return Field(default=0.0, validation_alias=f"trl/{key}", serialization_alias=f"trl/{key}")


class TrainingMetrics(Record):
    """Figures of the steps of a run: how many there were, their time (s) and losses; why the guard `stopped` them, if it
    did, after which step the weights were `kept`, and its `checks`. Those of TRL are means over the last quarter of
    the steps.
    """

    steps: int = 0
    step_seconds: float = 0.0
    train_loss: float = 0.0
    rows: int = 0
    loss: list[float] = Field(default_factory=list)
    trl_loss: float = _trl("loss")
    trl_margins: float = _trl("rewards/margins")
    trl_kl: float = _trl("kl")
    trl_first_reward: float = _trl("first_reward")
    stopped: str | None = None
    kept: int = 0
    checks: list[Check] = Field(default_factory=list)


class RunMetrics(VerdictMetrics, TrainingMetrics, Estimate):
    """What can be read of every run. `taken_back` names the turns that taught an earlier version and about which opinions
    were taken back since. `steps_share_of_run` is the share of the run's time that its steps took.
    """

    taken_back: list[str] = Field(default_factory=list)
    steps_share_of_run: float = 0.0


class EvidenceMetrics(Record):
    """What the verdict rests on."""

    evidence: Evidence


class AllMetrics(RunMetrics, EvidenceMetrics):
    """What a run records: also what is read by the version of kibitz alone that wrote it."""

    answers_before: Manner
    answers_after: Manner
