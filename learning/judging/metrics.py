"""Metrics of a run: the figures in `metrics.json` and in the record of its version.

Both are flat JSON, with the fields of these records as keys. A figure that an older kibitz did not record gets its default.
"""

from dataclasses import dataclass

from pydantic import Field

from bot.records import Record
from learning.judging.evaluation import Manner
from learning.judging.gate import Evidence, VerdictMetrics
from learning.judging.off_policy import Estimate
from learning.judging.statistics import Interval


@dataclass(frozen=True)
class Health:
    """The state of a policy during a run.

    `liked` is the mean log-probability of held-out liked answers (nats per token; None without any). `kl` is the KL to the
    base. `gained` is the change of the margin of liked over disliked held-out answers since the run began, with its 95%
    interval (None unless there are both). `liked_error` is the standard error of the change of `liked`.
    """

    liked: float | None
    kl: float
    well_formed: int
    samples: int
    gained: Interval | None = None
    liked_error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Check(Health):
    """The state of a policy after a step of a run."""

    step: int


def _trl(key: str) -> float:
    return Field(default=0.0, validation_alias=f"trl/{key}", serialization_alias=f"trl/{key}")


class TrainingMetrics(Record):
    """Figures of the steps of a run: their number, time (s) and losses.

    `stopped` is why the guard stopped the run, or None. `kept` is the step whose weights were kept. `checks` are the
    guard's. TRL's figures are means over the last quarter of the steps.
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

    @property
    def is_harmed(self) -> bool:
        """Whether training only harmed the policy: the guard stopped it before any check passed."""
        return self.stopped is not None and not self.kept


class DistillationMetrics(Record):
    """The number of the policy's own answers that it learned from, and why the guard stopped that, or None."""

    labels: int = 0
    labels_stopped: str | None = None


class RunMetrics(VerdictMetrics, TrainingMetrics, DistillationMetrics, Estimate):
    """Metrics that can be read of every run.

    `taken_back` has the turns that taught an earlier version and whose opinions were retracted since. `steps_share_of_run`
    is the share of the run's time that its steps took.
    """

    taken_back: list[str] = Field(default_factory=list)
    steps_share_of_run: float = 0.0


class EvidenceMetrics(Record):
    """The evidence of the verdict."""

    evidence: Evidence


class AllMetrics(RunMetrics, EvidenceMetrics):
    """Everything that a run records, including figures that only the version of kibitz that wrote them reads."""

    answers_before: Manner
    answers_after: Manner
