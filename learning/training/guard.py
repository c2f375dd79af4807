"""Guard: stop a training run that harms the policy, and restore the weights of the last check that passed.

If no check passed, the weights stay as they are: the version is measured and rejected, so that people see what was learned.

Margins can look perfect while a policy collapses. The guard therefore watches the likelihood of held-out liked answers, the
KL to the base, and whether samples are well-formed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binomtest, fisher_exact, norm
from transformers import TrainerCallback

from bot.wording import count_noun
from learning.judging.metrics import Check, Health
from learning.models.ranks import broadcast_from_first
from learning.models.trainable import copy_weights, restore_weights

CHECKS = 3  # per run
STEPS_BETWEEN_CHECKS = 2  # at least; a check costs as much as several steps, so a shorter run is checked once
LUCK = 0.05  # significance level: a limit counts as passed only beyond chance
# Nats a token that held-out liked answers may lose against the start of the run, at temperature 1. A lower temperature
# sharpens the distribution, so that the same step costs proportionally more.
LIKED_LOSS = 0.15


@dataclass(frozen=True)
class Limits:
    """The largest KL to the base (nats a token), the smallest share of well-formed samples, and the policy's temperature."""

    kl: float
    well_formed: float
    temperature: float = 1.0

    @property
    def liked_loss(self) -> float:
        """The largest loss allowed of held-out liked answers (nats a token)."""
        return LIKED_LOSS / self.temperature


def choose_check_steps(steps: int) -> set[int]:
    """Return the steps after which a run is checked: at each third, or of a very short run only after the last."""
    checks = CHECKS if steps >= CHECKS * STEPS_BETWEEN_CHECKS else 1
    return {-(-steps * part // checks) for part in range(1, checks + 1)}


class Guard(TrainerCallback):
    """Checks a model at the start of a run and after some of its steps. `stopped` is the reason if the run was stopped."""

    def __init__(self, measure: Callable[[], Health], limits: Limits):
        self.measure = measure
        self.limits = limits
        self.first: Health | None = None
        self.stopped: str | None = None
        self.kept = 0  # the step whose weights a stopped run keeps; 0 if no check passed
        self.checks: list[Check] = []
        self._good: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the policy and copy its weights."""
        if self.first is None:
            self.first = self._check(0)
        self._good = copy_weights(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check after some steps (`choose_check_steps`). If a check fails, restore the last good weights and stop."""
        if state.global_step not in choose_check_steps(state.max_steps):
            return
        assert self.first is not None
        self.stopped = broadcast_from_first(self.find_fault(self.first, self._check(state.global_step)))
        model.train()
        if self.stopped is None:
            self._good, self.kept = copy_weights(model), state.global_step
            return
        if self.kept:
            restore_weights(model, self._good)
        self.stopped += f"; stopped after {state.global_step} of {state.max_steps} steps"
        control.should_training_stop = True

    def _check(self, step: int) -> Health:
        found = self.measure()
        self.checks.append(Check(**asdict(found), step=step))
        return found

    def find_fault(self, first: Health, now: Health) -> str | None:
        """Return the fault of a check against the first one, as a message, or None."""
        if not now.kl <= max(self.limits.kl, first.kl):
            return f"KL to the base is {now.kl:.3f} nats a token (gate.kl_budget {self.limits.kl:g})"
        most = self.limits.liked_loss + norm.isf(LUCK) * now.liked_error
        if first.liked is not None and now.liked is not None and not now.liked >= first.liked - most:
            return f"held-out liked answers lost {first.liked - now.liked:.2f} nats a token"
        if self._has_too_few_well_formed(first, now):
            return f"only {now.well_formed} of {count_noun(now.samples, 'sample')} well-formed"
        return None

    def _has_too_few_well_formed(self, first: Health, now: Health) -> bool:
        """Tell whether fewer samples are well-formed than the limit, or than at the start if that was below the limit."""
        if first.well_formed >= self.limits.well_formed * first.samples:
            return binomtest(now.well_formed, now.samples, self.limits.well_formed, "less").pvalue < LUCK
        table = [[one.well_formed, one.samples - one.well_formed] for one in (now, first)]
        return fisher_exact(table, "less").pvalue < LUCK
