"""ReplayBuffer: derive experiences from turns and feedback, for one training run.

It stores nothing: each snapshot is rebuilt from the facts, and counts the turns that it leaves out by reason. It does not
depend on an objective or on model weights.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from bot.chat.dialogue import UNFINISHED_REASONS
from bot.config import Config
from bot.memory.embedder import Embedder
from bot.models.tokenizer import ChatTokenizer
from bot.store.conversations import ConversationStore
from bot.store.feedback import find_reasons, select_effective
from bot.store.judged import (
    JudgedTurn,
    find_judged_or_followed_turns,
    find_judged_turns,
    find_reconsidered_turns,
    find_unjudged_turns,
)
from bot.store.registry import PolicyRegistry
from bot.store.teachers import find_feedback_that_taught, find_turns_that_taught
from bot.store.users import Users
from bot.types import Feedback, FeedbackKind, FollowUp, Message, Reason, Turn, now
from learning.data.comparison import pair_best_with_worst, with_advantages
from learning.data.experience import Experience, Snapshot
from learning.data.rewards import Reward, compute_reward
from learning.data.selection import (
    count_fresh,
    draw_fresh_and_old,
    draw_order_key,
    drop_near_duplicates,
    explain_not_drawn,
    is_held_out,
    select_for_training,
    split_held_out,
)
from learning.data.voices import IMPORT_PLATFORM, Voices

PAGE = 256  # turns in one read


@dataclass(frozen=True)
class Decision:
    """The feedback on a turn that counts, the reasons why the rest does not, and the resulting reward.

    `feedback` has all acts of feedback, each with the reason why it does not count, or None if it does. `reward` is computed
    from those that count, and from `followup` if `followup_reason` is None. `reason` is why the turn is not trained on, or
    None.
    """

    feedback: list[tuple[Feedback, str | None]]
    followup: FollowUp | None
    followup_reason: str | None
    reward: Reward | None
    reason: str | None
    is_held_out: bool

    @property
    def counted_feedback(self) -> list[Feedback]:
        """The acts of feedback that count."""
        return [row for row, reason in self.feedback if reason is None]

    def find_said_at(self, turn: Turn) -> datetime:
        """Return the time of the first feedback that counts; the time of the turn, if a follow-up counts."""
        is_followed_up = self.followup is not None and self.followup_reason is None
        return min([row.at for row in self.counted_feedback] + [turn.at] * is_followed_up, default=turn.at)


@dataclass(frozen=True)
class KnownVersions:
    """The versions of another base model (`foreign`), and how many versions came after each one (`age`)."""

    foreign: set[str]
    age: dict[str, int]


@dataclass(frozen=True)
class UnjudgedPrompt:
    """A prompt whose answer nobody judged: its turn, and its token ids."""

    turn_id: str
    prompt_ids: tuple[int, ...]


def without_foreign_ids(turn: Turn, foreign: set[str]) -> Turn:
    """Return a turn without token ids and log-probabilities if a version of another base model answered.

    `foreign` has the names of those versions (`PolicyRegistry.find_foreign`).
    """
    return turn.without_token_ids() if turn.policy_version in foreign else turn


class ReplayBuffer:
    """Draws snapshots from the ConversationStore.

    With an embedder, rewards are compared within a kind of prompt, and near-duplicates by one person count once.
    """

    def __init__(self, store: ConversationStore, tokenizer: ChatTokenizer, config: Config, embedder: Embedder | None = None):
        self.store = store
        self.tokenizer = tokenizer
        self.config = config
        self.embedder = embedder
        self.users = Users(store.database, config.privacy)

    def snapshot(self, space: str | None = None, since: str = "") -> Snapshot:
        """Return what a run can learn from now, limited to one imported `space`, or to the turns from `since` on, if given.

        It reads only the turns that are drawn, and those that it needs to decide which ones to draw.
        """
        learning = self.config.learning
        drawn_at = now()
        found = self._read_pool(space, since)
        found.drawn_at = drawn_at
        drawn, dropped = draw_fresh_and_old(found.training, learning.max_turns, learning.fresh)
        found.dropped += dropped
        training, found.held_out = split_held_out(drawn, learning.held_out)
        if self.embedder is not None and training:
            training, dropped = drop_near_duplicates(
                training, self.embedder.encode([f"{one.question}\n{one.answer}" for one in training])
            )
            found.dropped += dropped
        found.training = with_advantages(training, self.embedder, self.config.rewards, self.config.seed)
        found.trained_on, dropped = select_for_training(found.training, self.config.training, self.config.seed)
        found.dropped += dropped
        found.without_logprobs = sum(one.logprobs is None for one in drawn)
        return found

    def find_unseen(self, since: str, drawn_at: datetime) -> list[Experience]:
        """Return the judged answers, from the turn `since` on, that no version whose rows were drawn by `drawn_at` learned
        from: held-out answers, and answers to new questions whose feedback is all from after `drawn_at`.
        """
        learning = self.config.learning
        found = self._read_pool(None, since)
        judged = [one for one in found.training if not one.is_correction]
        drawn, _ = draw_fresh_and_old(judged, learning.max_turns, learning.fresh)
        known = self._find_taught_units() | {one.unit for one in found.rated if one.said_at < drawn_at}
        return [one for one in drawn if is_held_out(one.unit, learning.held_out) or one.unit not in known]

    def _find_taught_units(self) -> set[str]:
        """Return the units of all turns whose feedback ever taught a version."""
        taught, found = sorted(find_turns_that_taught(self.store.database)), set[str]()
        for start in range(0, len(taught), PAGE):
            turns = self.store.read_turns(taught[start : start + PAGE])
            voices = Voices(self.store, self.users, turns, self.config.web)
            found |= {voices.find_unit(turn) for turn in turns}
        return found

    def read_rated(self, newest: int | None = None) -> list[Experience]:
        """Return all answers with a reward, oldest first, or those of the `newest` turns with feedback."""
        found, reader = Snapshot(), self._find_known_versions()
        judged = self._find_judged()
        judged = judged if newest is None else judged[-newest:]
        for start in range(0, len(judged), PAGE):
            self._read_into(judged[start : start + PAGE], reader, found)
        return found.rated

    def find_unjudged(self, most: int) -> list[UnjudgedPrompt]:
        """Return the newest prompts, `most` at most, whose answers nobody judged, newest first.

        None is held out, and all whose words they contain consent.
        """
        ids = find_unjudged_turns(self.store.database, 2 * most, IMPORT_PLATFORM)
        turns = self.store.read_turns(ids)
        voices = Voices(self.store, self.users, turns, self.config.web)
        foreign, found = PolicyRegistry(self.store.database).find_foreign(), dict[tuple[int, ...], UnjudgedPrompt]()
        for turn in reversed(turns):
            unit = voices.find_unit(turn)
            if is_held_out(unit, self.config.learning.held_out) or not voices.consent.may_teach(turn):
                continue
            turn = without_foreign_ids(turn, foreign)
            prompt, completion = self._find_ids(turn)
            is_short = len(prompt) + len(completion) <= self.config.training.max_length
            if is_short and (turn.completion_ids is None or self._has_own_ids(turn, completion)):
                found.setdefault(prompt, UnjudgedPrompt(turn.id, prompt))
        return [*found.values()][:most]

    def _find_judged(self, space: str | None = None) -> list[JudgedTurn]:
        find = find_judged_or_followed_turns if self.config.rewards.followup > 0 else find_judged_turns
        return find(self.store.database, space)

    def _read_pool(self, space: str | None, since: str) -> Snapshot:
        """Return the experiences that a run is drawn from, all in `training`, and the other turns counted by reason.

        Turns are read a page at a time: first the newest, then the older ones in the order of `draw_order_key`, until there
        are enough usable ones of each.
        """
        everything = self._find_judged(space)
        judged = [one for one in everything if one.turn_id >= since]
        found = Snapshot(turns=len(everything), taken_back=self._find_retracted({one.turn_id for one in everything}))
        if len(judged) < len(everything):
            found.dropped["older than the detected change of opinions"] = len(everything) - len(judged)
        most = self.config.learning.max_turns
        newest = count_fresh(most, self.config.learning.fresh)
        answers: defaultdict[str, list[JudgedTurn]] = defaultdict(list)
        for one in judged:
            answers[one.message_id].append(one)
        reader, read = self._find_known_versions(), set[JudgedTurn]()
        usable: Counter[str] = Counter()
        for wanted, in_order in ((newest, reversed(judged)), (most - newest, self._yield_in_draw_order(judged, read))):
            while wanted > 0 and (page := list(itertools.islice(in_order, PAGE))):
                unread = {other for one in page for other in answers[one.message_id]} - read
                read |= unread
                usable.update(self._read_into(unread, reader, found))
                wanted -= sum(usable[one.turn_id] for one in page)
        found.dropped[explain_not_drawn(most)] += len(judged) - len(read)
        found.dropped = +found.dropped
        found.training.sort(key=lambda one: one.turn_id)
        found.rated.sort(key=lambda one: one.turn_id)
        return found

    def _yield_in_draw_order(self, judged: Sequence[JudgedTurn], read: set[JudgedTurn]) -> Iterator[JudgedTurn]:
        yield from sorted(set(judged) - read, key=lambda one: draw_order_key(one.turn_id))

    def _find_retracted(self, turn_ids: set[str]) -> list[str]:
        """Return the turn of each opinion that taught an earlier version and was retracted since."""
        said = self.store.read_feedback_on(find_reconsidered_turns(self.store.database) & turn_ids)
        given = [row for rows in said.values() for row in rows]
        gone = {row.id for row in given} - {row.id for row in select_effective(given)}
        taught = find_feedback_that_taught(self.store.database, sorted(gone))
        return sorted(row.turn_id for row in given if row.id in taught)

    def _find_known_versions(self) -> "KnownVersions":
        registry = PolicyRegistry(self.store.database)
        age = {name: age for age, name in enumerate(reversed(registry.find_directories()))}
        return KnownVersions(registry.find_foreign(), age)

    def _read_into(self, judged: Iterable[JudgedTurn], reader: "KnownVersions", found: Snapshot) -> list[str]:
        """Read some turns into a snapshot, and return the turn id of each usable experience.

        `judged` must have all answers to a question together.
        """
        turns = self.store.read_turns(one.turn_id for one in judged)
        voices = Voices(self.store, self.users, turns, self.config.web)
        answers: dict[str, list[tuple[float, Experience]]] = defaultdict(list)
        for turn in (without_foreign_ids(turn, reader.foreign) for turn in turns):
            decision = self._decide(turn, voices)
            earned = decision.reward
            if decision.reason is not None or earned is None:
                found.dropped[decision.reason or ""] += 1
                continue
            wanted = [row.text for row in decision.counted_feedback if row.kind == FeedbackKind.CORRECTION and row.text]
            age, wish = reader.age.get(turn.policy_version, 0), wanted[-1] if wanted else None
            ranks = tuple(row.id for row in voices.find_ranks(turn))
            reasons = frozenset(self._find_reasons(turn, voices, decision))
            for one in self._make_experiences(turn, voices, earned, wish, age):
                one = replace(one, said_at=decision.find_said_at(turn), rank_ids=ranks, reasons=reasons)
                found.rated.append(one)
                if (reason := self._explain_too_long(one)) is not None:
                    found.dropped[reason] += 1
                else:
                    answers[turn.message_id].append((voices.compute_rank(turn), one))
        usable = [one for ranked in answers.values() for one in pair_best_with_worst(ranked)]
        found.training += usable
        return [one.turn_id for one in usable]

    def _find_reasons(self, turn: Turn, voices: Voices, decision: Decision) -> set[Reason]:
        """Return the reasons for disliking a turn of those people whose opinions make its reward."""
        opinions = {} if decision.reward is None else decision.reward.opinions
        people = {row.user_id for row in decision.counted_feedback}
        asked = [one for one in people if voices.resolve_person(turn, one) in opinions]
        return set().union(*(find_reasons(decision.counted_feedback, one) for one in asked))

    def decide(self, turn: Turn) -> Decision:
        """Decide what counts of the feedback on one turn, as a run that started now would."""
        turn = without_foreign_ids(turn, PolicyRegistry(self.store.database).find_foreign())
        voices = Voices(self.store, self.users, [turn], self.config.web)
        decision = self._decide(turn, voices)
        if decision.reason is None and decision.reward is not None:
            first = next(self._make_experiences(turn, voices, decision.reward, None, 0))
            return replace(decision, reason=self._explain_too_long(first))
        return decision

    def _explain_too_long(self, one: Experience) -> str | None:
        most = self.config.training.max_length
        return f"longer than training.max_length ({most})" if one.length > most else None

    def _decide(self, turn: Turn, voices: Voices) -> Decision:
        opinions = voices.judge_feedback(turn)
        followup, followup_reason = voices.judge_followup(turn, self.config.rewards)
        counted = [
            replace(row, user_id=voices.resolve_person(turn, row.user_id)) for row, reason in opinions if reason is None
        ]
        asker = voices.resolve_person(turn, turn.asker_id)
        earned = compute_reward(counted, asker, self.config.rewards, None if followup_reason else followup)
        is_kept_out = is_held_out(voices.find_unit(turn), self.config.learning.held_out)
        return Decision(
            opinions, followup, followup_reason, earned, self._explain_exclusion(turn, earned, voices), is_kept_out
        )

    def _explain_exclusion(self, turn: Turn, earned: Reward | None, voices: Voices) -> str | None:
        if not voices.consent.may_teach(turn):
            return "a person whose words it contains does not consent"
        if earned is None:
            return "no opinion that counts"
        if earned.value == 0:
            return "opinions cancel out"
        if turn.finish_reason in UNFINISHED_REASONS:
            return "the answer broke off"
        if not turn.text.strip():
            return "the answer is empty"
        if turn.completion_ids is not None and not self._has_own_ids(turn, turn.completion_ids):
            return "its token ids are from another tokenizer"
        return None

    def _has_own_ids(self, turn: Turn, completion: Sequence[int]) -> bool:
        """Whether a turn's token ids are in our vocabulary, and its answer's spell its text (up to a stop string)."""
        prompt, text, has_stops = turn.prompt_ids or (), turn.text, bool(turn.sampling.stop)
        ids, size = [*prompt, *completion], len(self.tokenizer.hf)
        if ids and not 0 <= min(ids) <= max(ids) < size:
            return False
        said = self.tokenizer.decode_answer(completion).strip()
        return said == text.strip() or (has_stops and said.startswith(text.strip()))

    def _make_experiences(
        self, turn: Turn, voices: Voices, earned: Reward, correction: str | None, age: int
    ) -> Iterator[Experience]:
        prompt, completion = self._find_ids(turn)
        is_sampled = not (turn.is_selected or turn.sampling.is_truncated) and age <= self.config.learning.max_age
        first = Experience(
            turn_id=turn.id,
            unit=voices.find_unit(turn),
            prompt_ids=prompt,
            completion_ids=completion,
            logprobs=turn.logprobs if is_sampled else None,
            reward=earned.value,
            feedback_ids=earned.feedback_ids,
            followup_id=earned.followup_id,
            asker=turn.asker_id,
            asker_voice=voices.resolve_person(turn, turn.asker_id),
            opinion_holders=tuple(earned.opinions),
            question=voices.questions[turn.message_id],
            question_id=turn.message_id,
            answer=turn.text,
            is_selected=turn.is_selected,
            mean_logprob=sum(turn.logprobs) / len(turn.logprobs) if turn.logprobs else None,
            is_finished=turn.finish_reason == "stop",
        )
        yield first
        if correction is not None:
            wanted = tuple(self.tokenizer.completion_ids(self.tokenizer.neutralise(correction)))
            yield replace(
                first,
                completion_ids=wanted,
                logprobs=None,
                reward=1.0,
                answer=correction,
                rejected_ids=completion,
                is_correction=True,
                is_selected=False,
                mean_logprob=None,
                is_finished=True,
            )

    def _find_ids(self, turn: Turn) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the token ids of a turn's prompt and answer: the recorded ones, or else those of their texts."""
        if turn.prompt_ids is not None and turn.completion_ids is not None:
            return turn.prompt_ids, turn.completion_ids
        prompt = tuple(self.tokenizer.prompt_ids(self._read_prompt_chat(turn)))
        return prompt, tuple(self.tokenizer.completion_ids(self.tokenizer.neutralise(turn.text)))

    def _read_prompt_chat(self, turn: Turn) -> list[dict[str, str]]:
        """Return the chat messages that led to a turn: those that the policy was shown, or else the chain of replies."""
        ids = [one for one, score in turn.shown.items() if score is None]
        said = self.store.find_messages([*ids, turn.message_id])
        recent = [said[one] for one in ids if one in said and said[one].conversation_id == turn.conversation_id]
        chain = [said[turn.message_id]]
        if recent:
            return self._format_chat([*recent, *chain])
        while (before := chain[-1].reply_to) is not None:
            found = self.store.find_messages([before]).get(before)
            if found is None or found.conversation_id != turn.conversation_id:
                break
            chain.append(found)
        return self._format_chat(chain[::-1])

    def _format_chat(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        kept = [one for one in messages if not one.is_forgotten]  # a forgotten message has no text left
        return [{"role": one.role.value, "content": self.tokenizer.neutralise(one.text)} for one in kept]
