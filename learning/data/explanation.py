"""Explanation: what made a turn, and how its feedback was used.

It has the version that answered, the earlier messages that the policy was shown with their scores, each opinion with the
reason if it does not count (decided by the replay buffer, as for a run), and the runs that learned from the turn. It reads
the database and the versions' manifests. `/why` in a chat and `kibitz why` say the same; a chat names nobody.

Run: ``kibitz why TURN``; without a turn it lists the latest turns with feedback.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bot.errors import DataError
from bot.store.registry import PolicyRegistry
from bot.store.teachers import find_taught_versions
from bot.types import Message, Selection, Turn
from bot.wording import count_noun
from learning.data.manifest import read_manifest, read_since
from learning.data.replay_buffer import Decision, ReplayBuffer

MAX_RUNS = 8  # newest runs that are shown
MAX_MOVED = 3  # features of a chosen answer that are shown


@dataclass(frozen=True)
class TrainingUse:
    """The use of a turn by a run.

    `advantage` is None if the version's files are gone. `smoothing` is the share of the advantage that was predicted from
    similar answers (`rewards.smoothing`). If `is_for_head`, the run did not train on the turn, but fitted a reward head to
    it. If `is_question_only`, the policy answered its question again for such a head.
    """

    policy: str
    advantage: float | None
    weight: float = 1.0
    smoothing: float = 0.0
    is_for_head: bool = False
    is_question_only: bool = False

    def describe(self) -> str:
        """Describe the use in one line for people."""
        if self.advantage is None:
            return f"used by {self.policy}, whose files are gone"
        if self.is_question_only:
            return f"used by {self.policy}: it answered the question again, and a reward head judged the answers"
        if self.is_for_head:
            return f"used by {self.policy}: it taught the reward head that judged the policy's own answers"
        meaning = ""
        if self.smoothing:
            meaning = f" ({self.smoothing:.0%} from similar answers, unless it was compared with another answer)"
        less = " (reduced because its people said more than their share)" if self.weight < 1 else ""
        return f"used by {self.policy}: advantage {self.advantage:+.2f}{meaning}, weight {self.weight:.2f}{less}"


@dataclass(frozen=True)
class TurnExplanation:
    """A turn with its question, feedback and uses.

    `remembered` are the earlier messages that the policy was shown, with their scores. `earlier_use_count` is how many more
    runs used the turn than `uses` has.
    """

    turn: Turn
    question: Message
    remembered: list[tuple[Message, float]]
    decision: Decision
    uses: list[TrainingUse]
    earlier_use_count: int = 0
    is_outdated: bool = False

    def lines(self) -> list[str]:
        """Return the explanation in lines for people, with the ids of those who said something."""
        return self._lines(lambda person: person)

    def lines_without_names(self) -> list[str]:
        """Return the same lines, in which no person is named."""
        return self._lines(lambda person: "the asker" if person == self.turn.asker_id else "somebody else")

    def _lines(self, name: Callable[[str], str]) -> list[str]:
        turn, decision = self.turn, self.decision
        found = [
            f"asked by {name(self.question.author_id)}, {self.question.at:%Y-%m-%d %H:%M}: {_shorten(self.question.text)}",
            f"answered by {turn.policy_version} in {turn.latency_ms:.0f} ms ({turn.finish_reason}): {_shorten(turn.text)}",
        ]
        found += _describe_sampling(turn)
        found += [] if turn.selection is None else _describe_selection(turn.selection)
        found += [
            f"remembered ({score:.2f}): {name(said.author_id)}: {_shorten(said.text)}" for said, score in self.remembered
        ]
        for row, reason in decision.feedback:
            said = f"said by {name(row.user_id)}, {row.at:%Y-%m-%d %H:%M}: {row.kind} ({row.signal or 'no signal'})"
            found.append(f"{said}, {_describe_counting(reason)}")
        if decision.followup is not None:
            kind = decision.followup.kind
            chance = decision.followup.chances[kind]
            found.append(f"follow-up: {kind} (chance {chance:.2f}), {_describe_counting(decision.followup_reason)}")
        if decision.reward is None:
            found.append("reward: none")
        else:
            parts = ", ".join(f"{name(who)} {worth:+.2f}" for who, worth in decision.reward.opinions.items())
            found.append(f"reward: {decision.reward.value:+.2f} ({parts})")
        if decision.reason is not None:
            found.append(f"not trained on: {decision.reason}")
        elif decision.is_held_out:
            found.append("held out: used to judge candidates, not to train them")
        elif self.is_outdated:
            found.append("no longer trained on: older than the detected change of opinions")
        found += [one.describe() for one in self.uses]
        if self.earlier_use_count:
            found.append(f"also used by {count_noun(self.earlier_use_count, 'earlier version')}")
        return found if self.uses else [*found, "not used by any version yet"]


def explain(turn_id: str, buffer: ReplayBuffer, registry: PolicyRegistry) -> TurnExplanation:
    """Explain a turn. Raises DataError if there is no such turn."""
    store = buffer.store
    turn = store.find_turn(turn_id)
    if turn is None:
        raise DataError(f"there is no turn '{turn_id}'; `kibitz why` lists the latest turns with feedback")
    decision = buffer.decide(turn)
    there = store.find_messages(turn.remembered)
    shown = sorted(((score, one) for one, score in turn.remembered.items() if one in there), reverse=True)
    followups = [decision.followup.message_id] if decision.followup is not None else []
    taught = set(find_taught_versions(registry.database, [row.id for row, _ in decision.feedback], followups))
    versions = list(registry.find_directories().items())
    used = [(name, path) for name, path in versions if name in taught]
    asked = [use for name, path in versions[-MAX_RUNS:] for use in _find_questions(name, Path(path), turn_id)]
    return TurnExplanation(
        turn=turn,
        question=store.read_message(turn.message_id),
        remembered=[(there[one], score) for score, one in shown],
        decision=decision,
        uses=[one for name, path in used[-MAX_RUNS:] for one in _find_uses(name, Path(path), turn_id)] + asked,
        earlier_use_count=len(used[:-MAX_RUNS]),
        is_outdated=turn_id < read_since(Path(registry.get_live().path)),
    )


def _find_uses(policy: str, directory: Path, turn_id: str) -> list[TrainingUse]:
    """Return the uses of a turn in a version's manifest; one without figures if the version's files are gone."""
    manifest = read_manifest(directory)
    if manifest is None:
        return [TrainingUse(policy, None)]
    smoothing = manifest.rewards["smoothing"]
    found = [TrainingUse(policy, row.advantage, row.weight, smoothing) for row in manifest.rows if row.turn_id == turn_id]
    of_head = [TrainingUse(policy, 0.0, is_for_head=True) for row in manifest.head_rows if row.turn_id == turn_id]
    return found or of_head


def _find_questions(policy: str, directory: Path, turn_id: str) -> list[TrainingUse]:
    manifest = read_manifest(directory)
    is_there = manifest is not None and turn_id in manifest.unjudged
    return [TrainingUse(policy, 0.0, is_question_only=True)] if is_there else []


def _describe_sampling(turn: Turn) -> list[str]:
    """Return a line about how an answer was sampled, or none if nothing of it was recorded."""
    told = []
    if turn.prompt_ids:
        told.append(f"prompt {count_noun(len(turn.prompt_ids), 'token')}")
    if turn.completion_ids:
        told.append(f"answer {count_noun(len(turn.completion_ids), 'token')}")
    if turn.logprobs:
        told.append(f"log-probability {sum(turn.logprobs):.2f}")
    if sampling := turn.sampling.describe():
        told.append(f"sampled with {sampling}")
    return [", ".join(told)] if told else []


def _describe_selection(selection: Selection) -> list[str]:
    """Return one or two lines about how an answer was selected."""
    if not selection.is_selected:
        if selection.is_plain:
            return ["a plain sample: drawn without a choice, for comparison with chosen answers"]
        return [f"not chosen from several answers: {selection.why}"] if selection.why else []
    chosen = selection.candidates[selection.chosen]
    count = count_noun(len(selection.candidates), "answer")
    told = [f"chosen from {count} by {selection.head or 'an unnamed head'}, with chance {chosen.chance:.2f}"]
    strongest = sorted(selection.moved.items(), key=lambda one: -abs(one[1]))[:MAX_MOVED]
    moved = ", ".join(f"{name} {moved:+.2f}" for name, moved in strongest)
    return [*told, f"against the mean of these answers (log odds): {moved}"] if moved else told


def _describe_counting(reason: str | None) -> str:
    return "counts" if reason is None else f"does not count: {reason}"


def _shorten(text: str) -> str:
    return " ".join(text[:400].split())[:160]
