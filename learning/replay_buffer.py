"""ReplayBuffer: experiences derived from turns and feedback, for one training run.

Nothing is kept here: a snapshot is rebuilt from the facts each time, and says of every turn that it leaves out why. It
knows no objective and no model weights.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bot.config import Config
from bot.conversations import ConversationStore
from bot.dialogue import UNFINISHED
from bot.embeddings import Embedder
from bot.feedback import standing
from bot.registry import PolicyRegistry
from bot.sampling import is_truncated
from bot.tokenizer import ChatTokenizer
from bot.types import Feedback, FeedbackKind, FollowUp, Message, Turn
from bot.users import Users
from learning.features import expected, features
from learning.rewards import Reward, reward
from learning.selection import fresh_and_old, kinds_of, parted, thinned, weighed

IMPORTED = "import"  # the platform of conversations that were read from a file


@dataclass(frozen=True)
class Experience:
    """One answer to learn from, as exact token ids.

    `unit` is what the held-out part is drawn by; `opinions` names those whose opinions the reward is made of, and
    `followup_id` is the message that it counts too. `logprobs` (nats, one for each of `completion_ids`) are those of its
    sampling, or None for a text that was not sampled so (imported, a person's correction, a truncated distribution).
    `rejected_ids` is an answer to the same prompt that people liked less; `hindsight_ids` is the prompt as somebody would
    have it who knows what the asker said next. `advantage` (in [-2, 2]) is what `compared` makes of the reward; `weight` (in
    (0, 1]) is less for those who say more than their share.
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
    rejected_ids: tuple[int, ...] | None = None
    hindsight_ids: tuple[int, ...] | None = None
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

    `rated` are all answers with a reward, also those that are too long or too many to train on. `taken_back` names the
    turn of each opinion that taught an earlier version and no longer stands.
    """

    training: list[Experience] = field(default_factory=list)
    held_out: list[Experience] = field(default_factory=list)
    rated: list[Experience] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    without_logprobs: int = 0
    taken_back: list[str] = field(default_factory=list)
    turns: int = 0

    @property
    def drawn(self) -> list[Experience]:
        """The training and the held-out part together, oldest first."""
        return sorted([*self.training, *self.held_out], key=lambda one: one.turn_id)

    @property
    def feedback_ids(self) -> list[str]:
        """The feedback that the training part learns from."""
        return sorted({one for experience in self.training for one in experience.feedback_ids})

    @property
    def followup_ids(self) -> list[str]:
        """The messages that followed up on answers, and that the training part takes for opinions."""
        return sorted({one.followup_id for one in self.training if one.followup_id is not None})


class Consent:
    """Who may be learned from, as it stands now. Imported conversations are the operator's to answer for."""

    def __init__(self, users: Users, platforms: dict[str, str], authors: dict[str, str]):
        self._platforms, self._authors = platforms, authors
        self._decided, self._assumed = users.decided(), users.assumed

    def of(self, said: Turn | Message, user_id: str) -> bool:
        """Whether a person in the conversation of `said` consents."""
        platform = self._platforms[said.conversation_id]
        return platform == IMPORTED or self._decided.get((platform, user_id), self._assumed)

    def to(self, turn: Turn) -> bool:
        """Whether everybody whose words the policy was shown for a turn consents."""
        shown = {self._authors[message] for message in turn.shown if message in self._authors}
        return all(self.of(turn, person) for person in shown | {turn.asker_id})


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
        found.without_logprobs = sum(one.logprobs is None for one in drawn)
        return found

    def _experiences(self, space: str | None) -> Snapshot:
        """All experiences, as if all were for training, and why the other turns are none."""
        turns = self.store.turns_with_feedback(space, followed_up=self.config.rewards.followup > 0)
        facts = _Facts(self.store, self.users, turns)
        registry = PolicyRegistry(self.store.database)
        found = Snapshot(turns=len(turns), taken_back=facts.turns_of(registry.taught() & facts.no_longer_stands))
        age = {version.name: age for age, version in enumerate(reversed(registry.all()))}
        answers: dict[str, list[tuple[float, Experience]]] = defaultdict(list)
        foreign = registry.foreign()
        for turn in turns:
            if turn.policy_version in foreign:  # of another tokenizer, and of another policy
                turn = replace(turn, prompt_ids=None, completion_ids=None, logprobs=None)
            said = facts.of(turn)
            earned = reward(said, turn.asker_id, self.config.rewards, facts.followups.get(turn.id))
            reason = self._why_not(turn, earned, facts)
            if reason is not None or earned is None:
                found.dropped[reason or ""] += 1
                continue
            wanted = [row.text for row in standing(said) if row.kind == FeedbackKind.CORRECTION and row.text]
            for one in self._of_turn(turn, facts, earned, wanted[-1] if wanted else None, age.get(turn.policy_version, 0)):
                found.rated.append(one)
                if one.length > self.config.training.max_length:
                    found.dropped[f"longer than training.max_length ({self.config.training.max_length})"] += 1
                else:
                    answers[turn.message_id].append((facts.rank(turn), one))
        for ranked in answers.values():
            found.training += paired(ranked)
        found.training.sort(key=lambda one: one.turn_id)
        return found

    def _why_not(self, turn: Turn, earned: Reward | None, facts: "_Facts") -> str | None:
        if not facts.consent.to(turn):
            return "somebody in it does not consent"
        if earned is None:
            return "no standing opinion of anybody who took part"
        if earned.value == 0:
            return "opinions cancel out"
        if turn.finish_reason in UNFINISHED:
            return "the answer broke off"
        if not turn.text.strip():
            return "the answer is empty"
        if turn.completion_ids is not None and not self._are_ours(turn.prompt_ids or (), turn.completion_ids, turn.text):
            return "its token ids are those of another tokenizer"
        return None

    def _are_ours(self, prompt: Sequence[int], completion: Sequence[int], text: str) -> bool:
        """Whether token ids are in our vocabulary, and those of an answer spell its text."""
        ids, size = [*prompt, *completion], len(self.tokenizer.hf)
        if ids and not 0 <= min(ids) <= max(ids) < size:
            return False
        return self.tokenizer.answer_text(completion).strip() == text.strip()

    def _of_turn(
        self, turn: Turn, facts: "_Facts", earned: Reward, correction: str | None, age: int
    ) -> Iterator[Experience]:
        if turn.prompt_ids is None or turn.completion_ids is None:
            prompt = tuple(self.tokenizer.prompt_ids(self._asked(turn)))
            completion = tuple(self.tokenizer.completion_ids(self.tokenizer.neutralise(turn.text)))
        else:
            prompt, completion = turn.prompt_ids, turn.completion_ids
        comment = facts.comments.get(turn.id)
        is_sampled = not is_truncated(turn.sampling) and age <= self.config.learning.max_age
        first = Experience(
            turn_id=turn.id,
            # A live conversation never ends, so there the unit is the question; an imported one is held out whole.
            unit=turn.conversation_id if facts.is_imported(turn) else turn.message_id,
            prompt_ids=prompt,
            completion_ids=completion,
            logprobs=turn.logprobs if is_sampled else None,
            reward=earned.value,
            feedback_ids=earned.feedback_ids,
            followup_id=earned.followup_id,
            asker=turn.asker_id,
            opinions=tuple(earned.opinions),
            question=facts.questions[turn.message_id],
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


class _Facts:
    """What the store says about some turns, read once."""

    def __init__(self, store: ConversationStore, users: Users, turns: Sequence[Turn]):
        places = {turn.conversation_id for turn in turns}
        self._given = store.feedback_of(turn.id for turn in turns)
        given = [row for rows in self._given.values() for row in rows]
        self.no_longer_stands = {row.id for row in given} - {row.id for row in standing(given)}
        self._platforms = store.platforms(places)
        self._speakers = store.speakers(places)
        self.consent = Consent(users, self._platforms, store.authors({one for turn in turns for one in turn.shown}))
        self.questions = store.texts({turn.message_id for turn in turns})
        self.followups: dict[str, FollowUp] = {}
        self.comments: dict[str, str] = {}
        said_next = store.said_next(turn.id for turn in turns)
        for turn in turns:
            followup, message = said_next.get(turn.id, (None, None))
            if followup and message and message.author_id == turn.asker_id and self.consent.of(turn, turn.asker_id):
                self.followups[turn.id], self.comments[turn.id] = followup, message.text

    def turns_of(self, feedback_ids: set[str]) -> list[str]:
        """The turn of each of some opinions."""
        return sorted(row.turn_id for rows in self._given.values() for row in rows if row.id in feedback_ids)

    def is_imported(self, turn: Turn) -> bool:
        """Whether a turn was read from a file."""
        return self._platforms[turn.conversation_id] == IMPORTED

    def of(self, turn: Turn) -> list[Feedback]:
        """What those said about a turn who consent, and who took part where it was said (law 7)."""
        there = self._speakers[turn.conversation_id] | {turn.asker_id}
        return [
            row
            for row in self._given[turn.id]
            if self.consent.of(turn, row.user_id) and (self.is_imported(turn) or row.user_id in there)
        ]

    def rank(self, turn: Turn) -> float:
        """How people ranked a turn among its siblings, higher is better; 0 where nobody did."""
        ranks = [
            row.value for row in standing(self._given[turn.id]) if row.kind == FeedbackKind.RANK and row.value is not None
        ]
        return -sum(ranks) / len(ranks) if ranks else 0.0


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
        ones[best] = replace(ones[best], rejected_ids=ones[worst].completion_ids)
    return ones


def told(tokenizer: ChatTokenizer, prompt_ids: Sequence[int], comment: str) -> tuple[int, ...]:
    """A prompt as somebody would have it who knows what the asker said next."""
    line = f"What the user will say to the answer: {tokenizer.neutralise(comment)}"
    return tuple(tokenizer.note_ids(line, prompt_ids))
