"""The small frozen records that the parts of kibitz exchange.

Ids are text. Times are timezone-aware and in UTC.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Self

import uuid_utils
from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from bot.records import Record, Time
from bot.wording import count_noun


def new_id() -> str:
    """Return a new UUIDv7 as text. Later ids sort after earlier ones."""
    return str(uuid_utils.uuid7())


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


Progress = Callable[[str, int, int], None]  # called with the stage, the amount done, and the total
Person = tuple[str, str]  # a platform, and a user id there
FORGOTTEN = ""  # the author id of an erased message; no user has it


class Role(StrEnum):
    """Who wrote a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class FeedbackKind(StrEnum):
    """The kind of one act of feedback."""

    APPROVAL = "approval"
    DISAPPROVAL = "disapproval"
    REGENERATE = "regenerate"
    CORRECTION = "correction"
    RATING = "rating"
    COMMENT = "comment"
    RANK = "rank"


class Reason(StrEnum):
    """Why a person dislikes an answer. Each reason that they give is a COMMENT with the reason as its text."""

    TOO_LONG = "too long"
    WRONG = "wrong"
    OFF_TOPIC = "off topic"
    TONE = "tone"
    UNSAFE = "unsafe"

    @property
    def signal(self) -> str:
        """The signal of the feedback that gives this reason. Each reason has its own, so that several stand side by side."""
        return f"reason: {self}"


class PolicyState(StrEnum):
    """The state of a policy version. `bot.store.registry` holds the transitions."""

    TRAINING = "training"
    CANDIDATE = "candidate"
    WAITING = "waiting"
    CANARY = "canary"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"
    PURGED = "purged"


@dataclass(frozen=True)
class Conversation:
    """A place where people talk: a terminal, a channel, a thread, or an imported dialogue.

    If `is_public`, everybody in its space may read it.
    """

    platform: str
    channel: str
    space: str = ""
    thread: str = ""
    is_public: bool = False
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `event_id` is the platform's id of its event, and unique.

    `author_name` is the name that people saw when it was written, "" if nobody else is in the conversation. An erased
    message (`bot.store.forgetting`) keeps its row: its author is FORGOTTEN and its text is empty.
    """

    conversation_id: str
    author_id: str
    text: str
    role: Role = Role.USER
    reply_to: str | None = None
    event_id: str | None = None
    at: datetime = field(default_factory=now)
    edited_at: datetime | None = None
    author_name: str = ""
    id: str = field(default_factory=new_id)

    @property
    def is_forgotten(self) -> bool:
        """Whether the message was erased."""
        return self.author_id == FORGOTTEN


class SamplingParams(Record):
    """How the tokens of an answer are sampled. Each default leaves the model's own distribution as it is.

    The answer has at most `max_tokens` and ends before the first of the texts `stop`. An imported turn has no value set.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)

    @property
    def is_truncated(self) -> bool:
        """Whether top_p, top_k or min_p cut away some tokens, which a trainer cannot reproduce."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    def describe(self) -> str:
        """Describe the values that were set and that change something, for people. Return "" if there are none."""
        told = [f"temperature {self.temperature:g}"] * ("temperature" in self.model_fields_set)
        told += [f"top_p {self.top_p:g}"] * (self.top_p < 1) + [f"top_k {self.top_k}"] * (self.top_k > 0)
        told += [f"min_p {self.min_p:g}"] * (self.min_p > 0)
        told += [] if self.max_tokens is None else [f"at most {count_noun(self.max_tokens, 'token')}"]
        told += [] if self.seed is None else [f"seed {self.seed}"]
        told += [count_noun(len(self.stop), "stop text")] * bool(self.stop)
        return ", ".join(told)


@dataclass(frozen=True)
class Reply:
    """An answer of the policy, with everything that made it.

    `prompt_ids` and `completion_ids` are the exact token ids. `logprobs` has the log-probability (nats) of each of the
    `completion_ids` under the sampling distribution.
    """

    text: str
    policy_version: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    sampling: SamplingParams
    latency_ms: float


class Candidate(Record):
    """One of several answers that were sampled for one message.

    `is_finished`: it ended by itself. `mean_logprob` is in nats per token. `score` is a pessimistic estimate of how much
    people like it, in log odds. `chance` is the probability with which it was chosen. Numbers are finite, because
    PostgreSQL stores no others in JSON.
    """

    text: str
    is_finished: bool = True
    mean_logprob: FiniteFloat | None = None
    score: FiniteFloat = 0.0
    chance: FiniteFloat = 0.0
    features: dict[str, FiniteFloat] = Field(default_factory=dict)


class Selection(Record):
    """How an answer was chosen, and from which candidates.

    `head` is the name of the reward head, and `chosen` the index of the answer among the candidates. If `is_plain`, the
    answer was drawn to be a plain sample, as an unbiased control. `why` says why only one answer was sampled, or why none
    was chosen. `moved` has the features that moved the chosen answer most against the mean of the candidates, in log odds.
    """

    head: str = ""
    chosen: NonNegativeInt = 0
    is_plain: bool = False
    why: str = ""
    candidates: list[Candidate] = Field(default_factory=list)
    moved: dict[str, FiniteFloat] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_chosen(self) -> Self:
        if self.chosen >= max(1, len(self.candidates)):
            raise ValueError(f"chosen is {self.chosen}, but there are {len(self.candidates)} candidates")
        return self

    @property
    def is_selected(self) -> bool:
        """Whether the answer was chosen from several, so that its distribution is not the policy's."""
        return len(self.candidates) > 1

    def without_texts(self) -> Self:
        """Return the selection with the texts of all candidates erased."""
        return self.model_copy(update={"candidates": [one.model_copy(update={"text": ""}) for one in self.candidates]})


@dataclass(frozen=True)
class FollowUp:
    """A message after an answer, with the probability of each kind of opinion that it may express about the answer."""

    turn_id: str
    message_id: str
    chances: dict[str, float]

    @property
    def kind(self) -> str:
        """The most likely kind."""
        return max(self.chances, key=lambda kind: self.chances[kind])


@dataclass(frozen=True)
class StoredMessage:
    """A committed message with its conversation. `is_new` is False if its event was stored before."""

    message: Message
    place: Conversation
    is_new: bool


@dataclass(frozen=True)
class Turn:
    """One answer in a conversation, with the message that it answers and everything that made it.

    An imported turn was not sampled by us: its `policy_version` is "imported", its ids and log-probabilities are None.
    `replaces` is the id of the turn that it regenerates. `shown` has the ids of the earlier messages in the prompt: recent
    messages with None, recalled ones with their similarity to the question. `selection` tells how the answer was chosen; it
    is None if nothing chooses answers.
    """

    conversation_id: str
    message_id: str
    reply_id: str
    text: str
    asker_id: str
    policy_version: str
    prompt_ids: tuple[int, ...] | None
    completion_ids: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    finish_reason: str
    sampling: SamplingParams
    latency_ms: float
    replaces: str | None = None
    shown: dict[str, float | None] = field(default_factory=dict)
    selection: Selection | None = None
    at: datetime = field(default_factory=now)
    id: str = field(default_factory=new_id)

    @property
    def is_selected(self) -> bool:
        """Whether it was chosen from several answers, so that its distribution is not the policy's."""
        return self.selection is not None and self.selection.is_selected

    @property
    def sources(self) -> set[str]:
        """The ids of the messages that it was made from: its question and the `shown` ones."""
        return {self.message_id, *self.shown}

    @property
    def remembered(self) -> dict[str, float]:
        """The recalled messages among the `shown`, with their similarity to the question."""
        return {message: score for message, score in self.shown.items() if score is not None}

    def without_token_ids(self) -> "Turn":
        """Return the turn without token ids and log-probabilities, so that its text is tokenized anew."""
        return replace(self, prompt_ids=None, completion_ids=None, logprobs=None)


@dataclass(frozen=True)
class Feedback:
    """One act of feedback of one person on one turn, or its retraction (`retracts`).

    `signal` is the means (an emoji, a button, a command), so that retracting ❤️ keeps 👍. `value` is the rank for RANK and a
    number in [-1, 1] for RATING. `text` is the wanted answer for CORRECTION and the comment for COMMENT.
    """

    turn_id: str
    user_id: str
    kind: FeedbackKind
    signal: str = ""
    retracts: bool = False
    value: float | None = None
    text: str | None = None
    event_id: str | None = None
    at: datetime = field(default_factory=now)
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Pick:
    """A person's choice between the answer `turn_id` and the answer that it replaces.

    `bot.store.picks` stores it as two acts of feedback.
    """

    turn_id: str
    user_id: str
    prefers_new: bool
    event_id: str | None = None
    at: datetime = field(default_factory=now)


class Metrics(Record):
    """The recorded verdict on a policy version, and the values that its life cycle depends on.

    `judged_against` is the version that was live then. `drawn_at` is the time at which its training rows were read,
    `judged_at` that of the opinions that judged it. `labels` is the number of the policy's own answers that it learned from,
    because a reward head judged them. `gain` is in rewards; `kl` is in nats per token, to the base. The other
    measures of a run (`learning.judging.metrics`) are kept with it.
    """

    reasons: list[str] = Field(default_factory=list)  # why it does not serve
    outcome: str = ""  # why its run ended without a verdict
    judged_against: str | None = None
    drawn_at: Time | None = None
    judged_at: Time | None = None
    waits_for: int = 0  # reactions after `drawn_at`
    had_enough_evidence: bool = False
    is_better: bool = False
    labels: int = 0
    kl: float | None = None
    gain: float | None = None
    live_before: str | None = Field(  # for a replaced base model: the version that was live
        default=None,
        validation_alias="live when the base model was changed",
        serialization_alias="live when the base model was changed",
    )


@dataclass(frozen=True)
class PolicyVersion:
    """One immutable version of the policy: a base model, an adapter on it, or weights of its own.

    `parent` is the version that its training continued. `replaced` is the one that was live when it was promoted.
    """

    name: str
    parent: str | None
    base_model: str
    path: str
    state: PolicyState
    sha256: str = ""
    replaced: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    created_at: datetime = field(default_factory=now)

    @property
    def is_base(self) -> bool:
        """Whether it is a base model."""
        return self.parent is None

    @property
    def judged_against(self) -> str | None:
        """The name of the version that was live when it was judged. Its verdict holds only against that one."""
        return self.metrics.judged_against or self.parent

    @property
    def awaited_reactions(self) -> int:
        """How many reactions must come after `drawn_at` until it is judged again, while it is WAITING."""
        return self.metrics.waits_for

    @property
    def drawn_at(self) -> datetime | None:
        """When its training rows were read, or None if not recorded."""
        return self.metrics.drawn_at

    @property
    def judged_at(self) -> datetime | None:
        """When the opinions that judged it were read, or None for a base model, which is not judged."""
        return self.metrics.judged_at

    @property
    def weights(self) -> str | None:
        """The directory of its own weights, or None for a base model."""
        return None if self.is_base else self.path
