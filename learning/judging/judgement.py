"""Judgement: the outcome for a version that was trained, or that waited."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """Whether a version passed the gate or waits for more reactions, and the reasons if it did not pass."""

    policy: str
    passed: bool
    waits: bool
    reasons: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON that a training process sends to the process that started it."""
        return {"policy": self.policy, "passed": self.passed, "waits": self.waits, "reasons": self.reasons}
