"""Explanation: why a turn is what it is, and what became of what people said about it.

The version that answered, the earlier messages that it was shown and how well they ranked, each opinion and why it does not
count if it does not (the replay buffer decides, as it does for a run), and the runs that learned from it, with what weight.
It reads the database and the versions' manifests. `/why` in a chat and `kibitz why` say the same; a chat names nobody.

Run: ``kibitz why TURN``; without a turn it lists the latest that people said something about.
"""

from dataclasses import dataclass
from pathlib import Path

from bot.errors import DataError
from bot.store.registry import PolicyRegistry
from bot.store.teachers import find_taught_versions
from bot.types import Message, Turn
from learning.data.manifest import read_manifest, read_since
from learning.data.replay_buffer import Decision, ReplayBuffer

MAX_RUNS = 8  # runs, the newest


@dataclass(frozen=True)
class TrainingUse:
    """That a run learned from a turn: what the turn was worth to it (None where its files are gone), how much it counted
    beside others, and which share of the worth is that of answers like it (`rewards.smoothing`).
    """

    policy: str
    advantage: float | None
    weight: float = 1.0
    smoothing: float = 0.0

    def describe(self) -> str:
        """What the run made of it, for people."""
        if self.advantage is None:
            return f"used by {self.policy}, whose files are gone"
        meaning = "against what is usual"
        if self.smoothing:
            meaning = (
                f"({self.smoothing:.0%} of it is what answers like it earned, the rest its own reward against the usual; "
                "all is its own where it was compared with another answer)"
            )
        less = ", for its age or because its people say more than their share" if self.weight < 1 else ""
        return f"used by {self.policy}: {self.advantage:+.2f} {meaning}, weight {self.weight:.2f}{less}"


@dataclass(frozen=True)
class TurnExplanation:
    """A turn with all that bears on it; `remembered` are older messages that it was shown, with their scores. `earlier` is
    how many runs used it besides those that are shown.
    """

    turn: Turn
    question: Message
    remembered: list[tuple[Message, float]]
    decision: Decision
    uses: list[TrainingUse]
    earlier_use_count: int = 0
    is_outdated: bool = False

    def lines(self, names: bool = True) -> list[str]:
        """All of it, for people; without `names` nobody is called by theirs."""
        turn, decision = self.turn, self.decision

        def name(person: str) -> str:
            return person if names else "the asker" if person == turn.asker_id else "somebody else"

        found = [
            f"asked by {name(self.question.author_id)}, {self.question.at:%Y-%m-%d %H:%M}: {_shorten(self.question.text)}",
            f"answered by {turn.policy_version} in {turn.latency_ms:.0f} ms ({turn.finish_reason}): {_shorten(turn.text)}",
            f"prompt {len(turn.prompt_ids or ())} tokens, answer {len(turn.completion_ids or ())} tokens, log-probability "
            f"{sum(turn.logprobs or ()):.2f}, sampled with {turn.sampling}",
        ]
        found += [
            f"remembered ({score:.2f}): {name(said.author_id)}: {_shorten(said.text)}" for said, score in self.remembered
        ]
        for row, reason in decision.feedback:
            said = f"said by {name(row.user_id)}, {row.at:%Y-%m-%d %H:%M}: {row.kind} ({row.signal or 'no signal'})"
            found.append(f"{said}, {_describe_counting(reason)}")
        if decision.followup is not None:
            kind = decision.followup.kind
            chance = decision.followup.chances[kind]
            found.append(f"said next: {kind} (chance {chance:.2f}), {_describe_counting(decision.followup_reason)}")
        if decision.reward is None:
            found.append("reward: none")
        else:
            parts = ", ".join(f"{name(who)} {worth:+.2f}" for who, worth in decision.reward.opinions.items())
            found.append(f"reward: {decision.reward.value:+.2f} ({parts})")
        if decision.reason is not None:
            found.append(f"teaches nothing: {decision.reason}")
        elif decision.is_held_out:
            found.append("held out: it judges candidates and teaches none")
        elif self.is_outdated:
            found.append("teaches nothing more: said before people came to want the opposite")
        found += [one.describe() for one in self.uses]
        if self.earlier_use_count:
            found.append(f"used by {self.earlier_use_count} earlier versions too")
        return found if self.uses else [*found, "used by no version yet"]


def explain(turn_id: str, buffer: ReplayBuffer, registry: PolicyRegistry) -> TurnExplanation:
    """Why a turn is what it is. Raises DataError where there is no such turn."""
    store = buffer.store
    turn = store.find_turn(turn_id)
    if turn is None:
        raise DataError(f"there is no turn '{turn_id}'; `kibitz why` lists the latest that people said something about")
    decision = buffer.decide(turn)
    there = store.find_messages(turn.remembered)
    shown = sorted(((score, one) for one, score in turn.remembered.items() if one in there), reverse=True)
    followups = [decision.followup.message_id] if decision.followup is not None else []
    taught = set(find_taught_versions(registry.database, [row.id for row, _ in decision.feedback], followups))
    used = [(name, path) for name, path in registry.find_directories().items() if name in taught]
    return TurnExplanation(
        turn=turn,
        question=store.read_message(turn.message_id),
        remembered=[(there[one], score) for score, one in shown],
        decision=decision,
        uses=[one for name, path in used[-MAX_RUNS:] for one in _find_uses(name, Path(path), turn_id)],
        earlier_use_count=len(used[:-MAX_RUNS]),
        is_outdated=turn_id < read_since(Path(registry.get_live().path)),
    )


def _find_uses(policy: str, directory: Path, turn_id: str) -> list[TrainingUse]:
    """What a version's manifest says of a turn; a version whose files are gone is named all the same."""
    manifest = read_manifest(directory)
    if manifest is None:
        return [TrainingUse(policy, None)]
    smoothing = manifest.rewards["smoothing"]
    return [TrainingUse(policy, row.advantage, row.weight, smoothing) for row in manifest.rows if row.turn_id == turn_id]


def _describe_counting(reason: str | None) -> str:
    return "counts" if reason is None else f"does not count: {reason}"


def _shorten(text: str) -> str:
    return " ".join(text[:400].split())[:160]
