"""ReplayBuffer: experiences derived from turns and feedback, for one training run.

Nothing is kept here: a snapshot is rebuilt from the facts each time, and says of every turn that it leaves out why. It
knows no objective and no model weights.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from bot.config import Config
from bot.conversations import ConversationStore
from bot.dialogue import UNFINISHED
from bot.embeddings import Embedder
from bot.registry import PolicyRegistry
from bot.sampling import is_truncated
from bot.tokenizer import ChatTokenizer
from bot.types import Feedback, FeedbackKind, FollowUp, Message, Turn, now
from bot.users import Users
from learning.features import expected, features
from learning.rewards import Reward, reward
from learning.selection import fresh_and_old, is_held_out, kinds_of, learnable, parted, thinned, weighed
from learning.voices import Voices

LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Experience:
    """One answer to learn from, as exact token ids.

    `unit` is what the held-out part is drawn by: an imported conversation, or the words of the question; `question_id` is
    the message that it answers, as others may. `opinions` names those whose opinions the reward is made of, and
    `followup_id` is the message that it counts too. `logprobs` (nats, one for each of `completion_ids`) are those of its
    sampling, or None for a text that was not sampled so (imported, a person's correction, a truncated distribution).
    `rejected_ids` is an answer to the same prompt that people liked less; `hindsight_ids` is the prompt as somebody would
    have it who knows what the asker said next. `feedback_ids` is what the reward is made of, and of an answer that is paired
    also what was said of the other and who ranked either (`rank_ids`). `said_at` is when the first of it was said.
    `advantage` (in [-2, 2]) is what `compared` makes of the reward; `weight` (in (0, 1]) is less for those who say more than
    their share.
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
    opinions: tuple[str, ...] = ()
    question: str = ""
    answer: str = ""
    question_id: str = ""
    rejected_ids: tuple[int, ...] | None = None
    hindsight_ids: tuple[int, ...] | None = None
    is_correction: bool = False
    rank_ids: tuple[str, ...] = ()
    said_at: datetime = LONG_AGO
    advantage: float = 0.0
    weight: float = 1.0

    @property
    def length(self) -> int:
        """How many tokens its longest sequence has."""
        asked = max(len(self.prompt_ids), len(self.hindsight_ids or ()))
        return asked + max(len(self.completion_ids), len(self.rejected_ids or ()))

    def digest(self) -> list[Any]:
        """What a manifest records of it."""
        texts = [self.prompt_ids, self.completion_ids, self.rejected_ids, self.hindsight_ids]
        ids = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]
        worth = [round(value, 6) for value in (self.reward, self.advantage, self.weight)]
        return [self.turn_id, ids, *worth, list(self.feedback_ids)]


@dataclass
class Snapshot:
    """The experiences of one run, in a fixed order, and what was left out under which reason.

    `learned` are those of the training part that the run's objective reads. `rated` are all answers with a reward, also
    those that are too long or too many to train on. `taken_back` names the turn of each opinion that taught an earlier
    version and no longer stands; `taught_units` are the units of all turns of which an opinion ever taught a version. All of
    it had been said by `drawn_at`.
    """

    training: list[Experience] = field(default_factory=list)
    learned: list[Experience] = field(default_factory=list)
    held_out: list[Experience] = field(default_factory=list)
    rated: list[Experience] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    without_logprobs: int = 0
    taken_back: list[str] = field(default_factory=list)
    taught_units: set[str] = field(default_factory=set)
    turns: int = 0
    drawn_at: datetime = field(default_factory=now, compare=False)

    @property
    def judged(self) -> list[Experience]:
        """The held-out answers that people liked or disliked: all but corrections, which nobody could dislike."""
        return [one for one in self.held_out if not one.is_correction]

    @property
    def drawn(self) -> list[Experience]:
        """The training and the held-out part together, oldest first."""
        return sorted([*self.training, *self.held_out], key=lambda one: one.turn_id)

    @property
    def feedback_ids(self) -> list[str]:
        """The feedback that the run learns from, or compares that with: forgetting any of it withdraws what the run made."""
        return sorted({one for experience in self.training for one in experience.feedback_ids})

    @property
    def followup_ids(self) -> list[str]:
        """The messages that followed up on answers, and that the run takes for opinions, in the same way."""
        return sorted({one.followup_id for one in self.training if one.followup_id is not None})


@dataclass(frozen=True)
class Decision:
    """What counts of what people said about a turn, and why the rest does not.

    `opinions` are all acts of feedback, each with the reason why it counts nothing (None: it counts); `reward` is made of
    those that count, and of `followup` where `followup_reason` is None. `reason` is why the turn teaches nothing, if so.
    """

    opinions: list[tuple[Feedback, str | None]]
    followup: FollowUp | None
    followup_reason: str | None
    reward: Reward | None
    reason: str | None
    is_held_out: bool

    @property
    def counted(self) -> list[Feedback]:
        """The acts of feedback that count."""
        return [row for row, reason in self.opinions if reason is None]

    def said_at(self, turn: Turn) -> datetime:
        """When the first of what counts was said; where a follow-up counts, when it was answered."""
        is_followed_up = self.followup is not None and self.followup_reason is None
        return min([row.at for row in self.counted] + [turn.at] * is_followed_up, default=turn.at)


class ReplayBuffer:
    """Draws snapshots from what the ConversationStore holds.

    With an embedder, answers are compared with what is usual for their kind of prompt, and what somebody says again and
    again counts once.
    """

    def __init__(self, store: ConversationStore, tokenizer: ChatTokenizer, config: Config, embedder: Embedder | None = None):
        self.store = store
        self.tokenizer = tokenizer
        self.config = config
        self.embedder = embedder
        self.users = Users(store.database, config.privacy)

    def snapshot(self, space: str | None = None, since: str = "") -> Snapshot:
        """All that can be learned from now: of one imported `space`, or from the turn `since` on, where they are given."""
        learning = self.config.learning
        found = self._experiences(space)
        found.drawn_at = now()
        still = [one for one in found.training if one.turn_id >= since]
        if len(still) < len(found.training):
            found.dropped["said before people came to want the opposite"] += len(found.training) - len(still)
        drawn, dropped = fresh_and_old(still, learning.max_turns, learning.fresh)
        found.dropped += dropped
        training, found.held_out = parted(drawn, learning.held_out)
        if self.embedder is not None and training:
            training, dropped = thinned(
                training, self.embedder.encode([f"{one.question}\n{one.answer}" for one in training])
            )
            found.dropped += dropped
        found.training = compared(training, self.embedder, self.config, self.config.seed)
        found.learned, dropped = learnable(found.training, self.config.training, self.config.seed)
        found.dropped += dropped
        found.without_logprobs = sum(one.logprobs is None for one in drawn)
        return found

    def unseen(self, since: str, drawn_at: datetime) -> list[Experience]:
        """The judged answers, from the turn `since` on, that no version learned from which drew its rows at `drawn_at` or
        before: those that are held out, and those to other questions on which all was said after that.
        """
        learning = self.config.learning
        found = self._experiences(None)
        drawn, _ = fresh_and_old(
            [one for one in found.training if one.turn_id >= since and not one.is_correction],
            *(learning.max_turns, learning.fresh),
        )
        known = found.taught_units | {one.unit for one in found.rated if one.said_at < drawn_at}
        return [one for one in drawn if is_held_out(one.unit, learning.held_out) or one.unit not in known]

    def _experiences(self, space: str | None) -> Snapshot:
        """All experiences, as if all were for training, and why the other turns are none."""
        turns = self.store.turns_with_feedback(space, followed_up=self.config.rewards.followup > 0)
        voices = Voices(self.store, self.users, turns, self.config.web)
        registry = PolicyRegistry(self.store.database)
        taught = registry.taught()
        found = Snapshot(turns=len(turns), taken_back=voices.turns_of(taught & voices.no_longer_stands))
        once = set(voices.turns_of(taught))
        found.taught_units = {voices.unit(turn) for turn in turns if turn.id in once}
        age = {version.name: age for age, version in enumerate(reversed(registry.all()))}
        answers: dict[str, list[tuple[float, Experience]]] = defaultdict(list)
        foreign = registry.foreign()
        for turn in (self._ours(turn, foreign) for turn in turns):
            decision = self._decide(turn, voices)
            earned = decision.reward
            if decision.reason is not None or earned is None:
                found.dropped[decision.reason or ""] += 1
                continue
            wanted = [row.text for row in decision.counted if row.kind == FeedbackKind.CORRECTION and row.text]
            wish = wanted[-1] if wanted else None
            for one in self._of_turn(turn, voices, earned, wish, age.get(turn.policy_version, 0)):
                ranks = tuple(row.id for row in voices.ranks(turn))
                one = replace(one, said_at=decision.said_at(turn), rank_ids=ranks)
                found.rated.append(one)
                if (reason := self._too_long(one)) is not None:
                    found.dropped[reason] += 1
                else:
                    answers[turn.message_id].append((voices.rank(turn), one))
        for ranked in answers.values():
            found.training += paired(ranked)
        found.training.sort(key=lambda one: one.turn_id)
        return found

    def decide(self, turn: Turn) -> Decision:
        """What counts of what people said about one turn, as a run that began now would take it."""
        turn = self._ours(turn, PolicyRegistry(self.store.database).foreign())
        voices = Voices(self.store, self.users, [turn], self.config.web)
        decision = self._decide(turn, voices)
        if decision.reason is None and decision.reward is not None:
            first = next(self._of_turn(turn, voices, decision.reward, None, 0))
            return replace(decision, reason=self._too_long(first))
        return decision

    def _too_long(self, one: Experience) -> str | None:
        most = self.config.training.max_length
        return f"longer than training.max_length ({most})" if one.length > most else None

    def _decide(self, turn: Turn, voices: Voices) -> Decision:
        opinions = voices.judge(turn)
        followup, followup_reason = voices.judge_followup(turn, self.config.rewards)
        counted = [replace(row, user_id=voices.voice(turn, row.user_id)) for row, reason in opinions if reason is None]
        asker = voices.voice(turn, turn.asker_id)
        earned = reward(counted, asker, self.config.rewards, None if followup_reason else followup)
        is_kept_out = is_held_out(voices.unit(turn), self.config.learning.held_out)
        return Decision(opinions, followup, followup_reason, earned, self._why_not(turn, earned, voices), is_kept_out)

    def _why_not(self, turn: Turn, earned: Reward | None, voices: Voices) -> str | None:
        if not voices.consent.to(turn):
            return "somebody in it does not consent"
        if earned is None:
            return "no standing opinion of anybody who took part"
        if earned.value == 0:
            return "opinions cancel out"
        if turn.finish_reason in UNFINISHED:
            return "the answer broke off"
        if not turn.text.strip():
            return "the answer is empty"
        if turn.completion_ids is not None and not self._are_ours(turn, turn.completion_ids):
            return "its token ids are those of another tokenizer"
        return None

    def _ours(self, turn: Turn, foreign: set[str]) -> Turn:
        """A turn as this base model reads it: what a version of another one answered is a text."""
        if turn.policy_version not in foreign:  # of another tokenizer, and of another policy
            return turn
        return replace(turn, prompt_ids=None, completion_ids=None, logprobs=None)

    def _are_ours(self, turn: Turn, completion: Sequence[int]) -> bool:
        """Whether token ids are in our vocabulary, and those of an answer spell its text, and a stop if it had one."""
        prompt, text, has_stops = turn.prompt_ids or (), turn.text, "stop" in turn.sampling
        ids, size = [*prompt, *completion], len(self.tokenizer.hf)
        if ids and not 0 <= min(ids) <= max(ids) < size:
            return False
        said = self.tokenizer.answer_text(completion).strip()
        return said == text.strip() or (has_stops and said.startswith(text.strip()))

    def _of_turn(self, turn: Turn, voices: Voices, earned: Reward, correction: str | None, age: int) -> Iterator[Experience]:
        if turn.prompt_ids is None or turn.completion_ids is None:
            prompt = tuple(self.tokenizer.prompt_ids(self._asked(turn)))
            completion = tuple(self.tokenizer.completion_ids(self.tokenizer.neutralise(turn.text)))
        else:
            prompt, completion = turn.prompt_ids, turn.completion_ids
        comment = voices.comment(turn)
        is_sampled = not is_truncated(turn.sampling) and age <= self.config.learning.max_age
        first = Experience(
            turn_id=turn.id,
            unit=voices.unit(turn),
            prompt_ids=prompt,
            completion_ids=completion,
            logprobs=turn.logprobs if is_sampled else None,
            reward=earned.value,
            feedback_ids=earned.feedback_ids,
            followup_id=earned.followup_id,
            asker=turn.asker_id,
            opinions=tuple(earned.opinions),
            question=voices.questions[turn.message_id],
            question_id=turn.message_id,
            answer=turn.text,
            hindsight_ids=None if comment is None else told(self.tokenizer, prompt, comment),
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
                hindsight_ids=None,
                is_correction=True,
            )

    def _asked(self, turn: Turn) -> list[dict[str, str]]:
        """The chat messages that led to a turn: the chain of replies to an imported one, else what the policy was shown."""
        said = {message.id: message for message in self.store.messages(turn.conversation_id)}
        recent = [said[one] for one, score in turn.shown.items() if score is None and one in said]
        if recent:
            return self._chat([*recent, said[turn.message_id]])
        chain: list[Message] = []
        at: str | None = turn.message_id
        while at is not None and at in said:
            chain.append(said[at])
            at = said[at].reply_to
        return self._chat(chain[::-1])

    def _chat(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        return [{"role": one.role.value, "content": self.tokenizer.neutralise(one.text)} for one in messages]


def compared(found: Sequence[Experience], embedder: Embedder | None, config: Config, seed: int) -> list[Experience]:
    """The experiences with their advantages and weights: with an embedder, beside what is usual for their kind of prompt.

    A share `rewards.smoothing` of each advantage is what answers like it earned: one reaction says little about one answer,
    and all of them say much about what is common to many. Answers that were compared with another one to the same question,
    a correction or a pick, keep what was said of them.
    """
    kind_of = kinds_of([one.question for one in found], embedder, seed)
    share = config.rewards.smoothing
    refused = {(one.prompt_ids, one.rejected_ids) for one in found}
    is_compared = [one.rejected_ids is not None or (one.prompt_ids, one.completion_ids) in refused for one in found]

    def smooth(worth: np.ndarray, weights: np.ndarray) -> np.ndarray:
        alike = expected(worth, features([one.answer for one in found], embedder), weights)
        return np.where(is_compared, worth, (1 - share) * worth + share * alike)

    return weighed(
        found,
        kind_of,
        config.rewards.prior,
        config.rewards.person_cap,
        config.learning.half_life,
        smooth if share and found else None,
    )


def paired(answers: Sequence[tuple[float, Experience]]) -> list[Experience]:
    """Answers to one question (with their ranks): the best with the worst as the one that it is preferred to."""
    ones = [one for _, one in answers]
    if len(ones) < 2 or any(one.rejected_ids is not None for one in ones):
        return ones
    order = sorted(range(len(ones)), key=lambda row: (ones[row].reward, answers[row][0]))
    worst, best = order[0], order[-1]
    is_better = (ones[worst].reward, answers[worst][0]) < (ones[best].reward, answers[best][0])
    is_other = ones[best].completion_ids != ones[worst].completion_ids
    if is_better and is_other and ones[worst].prompt_ids == ones[best].prompt_ids:
        said = {one for row in (best, worst) for one in (*ones[row].feedback_ids, *ones[row].rank_ids)}
        both = tuple(sorted(said))  # the other may be left out of the run, but taught it all the same
        ones[best] = replace(ones[best], rejected_ids=ones[worst].completion_ids, feedback_ids=both)
    return ones


def told(tokenizer: ChatTokenizer, prompt_ids: Sequence[int], comment: str) -> tuple[int, ...]:
    """A prompt as somebody would have it who knows what the asker said next."""
    line = f"What the user will say to the answer: {tokenizer.neutralise(comment)}"
    return tuple(tokenizer.note_ids(line, prompt_ids))
