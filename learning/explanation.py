"""Explanation: why a turn is what it is, and what became of what people said about it.

The version that answered, the earlier messages that it was shown and how well they ranked, the reward and whose opinions
it is made of, and the runs that used it, with what weight. It reads the database and the versions' manifests.

Run: ``kibitz why TURN``; without a turn it lists the latest that people said something about.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from bot.config import RewardsConfig
from bot.conversations import ConversationStore
from bot.errors import DataError
from bot.feedback import standing
from bot.registry import PolicyRegistry
from bot.types import Feedback, FollowUp, Message, Turn
from learning.rewards import Reward, reward


@dataclass(frozen=True)
class Used:
    """That a run learned from a turn: what it was worth to it, and how much it counted beside others."""

    policy: str
    advantage: float
    weight: float


@dataclass(frozen=True)
class Account:
    """A turn with all that bears on it; `remembered` are older messages that it was shown, with their scores."""

    turn: Turn
    question: Message
    remembered: list[tuple[Message, float]]
    feedback: list[Feedback]
    followup: FollowUp | None
    reward: Reward | None
    used: list[Used]

    def lines(self) -> list[str]:
        """All of it, for people."""
        turn = self.turn
        found = [
            f"asked by {self.question.author_id}, {self.question.at:%Y-%m-%d %H:%M}: {_short(self.question.text)}",
            f"answered by {turn.policy_version} in {turn.latency_ms:.0f} ms ({turn.finish_reason}): {_short(turn.text)}",
        ]
        found += [f"remembered ({score:.2f}): {said.author_id}: {_short(said.text)}" for said, score in self.remembered]
        held = {row.id for row in standing(self.feedback)}
        for row in self.feedback:
            state = "taken back" if row.retracts else "stands" if row.id in held else "no longer stands"
            found.append(
                f"said by {row.user_id}, {row.at:%Y-%m-%d %H:%M}: {row.kind} ({row.signal or 'no signal'}), {state}"
            )
        if self.followup is not None:
            kind = self.followup.kind
            counts = "counted" if self.reward and self.reward.followup_id else "not counted"
            found.append(f"said next: {kind} (chance {self.followup.chances[kind]:.2f}), {counts}")
        if self.reward is None:
            found.append("reward: none, no opinion stands")
        else:
            parts = ", ".join(f"{who} {worth:+.2f}" for who, worth in self.reward.opinions.items())
            found.append(f"reward: {self.reward.value:+.2f} ({parts})")
        found += [
            f"used by {one.policy}: {one.advantage:+.2f} against what is usual, weight {one.weight:.2f}" for one in self.used
        ]
        return found if self.used else [*found, "used by no version yet"]


def explained(turn_id: str, store: ConversationStore, registry: PolicyRegistry, config: RewardsConfig) -> Account:
    """Why a turn is what it is. Raises DataError where there is no such turn."""
    turn = store.turn(turn_id)
    if turn is None:
        raise DataError(f"there is no turn '{turn_id}'; `kibitz why` lists the latest that people said something about")
    said = store.feedback_of([turn_id]).get(turn_id, [])
    followup, _ = store.said_next([turn_id]).get(turn_id, (None, None))
    shown = sorted(((score, one) for one, score in turn.remembered.items()), reverse=True)
    return Account(
        turn=turn,
        question=store.message(turn.message_id),
        remembered=[(store.message(one), score) for score, one in shown],
        feedback=said,
        followup=followup,
        reward=reward(said, turn.asker_id, config, followup),
        used=[
            used
            for policy in registry.runs_that_used([row.id for row in said], [followup.message_id] if followup else [])
            for used in _used(registry, policy, turn_id)
        ],
    )


def _used(registry: PolicyRegistry, policy: str, turn_id: str) -> list[Used]:
    """What a version's manifest says of a turn; a version whose files are gone is named all the same."""
    manifest = Path(registry.get(policy).path) / "manifest.json"
    if not manifest.is_file():
        return [Used(policy, float("nan"), float("nan"))]
    rows = json.loads(manifest.read_text())["rows"]
    return [Used(policy, advantage, weight) for name, _, _, advantage, weight, _ in rows if name == turn_id]


def _short(text: str) -> str:
    return " ".join(text[:400].split())[:160]
