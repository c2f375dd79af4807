"""Judgement: what became of a version that a run trained, or that waited."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """Whether a version passed the gate, or waits for more reactions, and why it did not pass."""

    policy: str
    passed: bool
    waits: bool
    reasons: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return what a training process tells the process that started it."""
        return {"policy": self.policy, "passed": self.passed, "waits": self.waits, "reasons": self.reasons}
