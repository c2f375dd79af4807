"""The small frozen records that the parts of kibitz hand to each other.

They know no database, no platform and no model. Ids are text; times are timezone-aware and in UTC.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Self

import uuid_utils
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer


def new_id() -> str:
    """A UUIDv7 as text: ids made later sort later."""
    return str(uuid_utils.uuid7())


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


Progress = Callable[[str, int, int], None]  # is told what is done: the stage, how much of it, of how much
Person = tuple[str, str]  # a platform, and its id for somebody
FORGOTTEN = ""  # stands for the author of an erased message; nobody is called so


class Role(StrEnum):
    """Who wrote a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class FeedbackKind(StrEnum):
    """What a person said about an answer."""

    APPROVAL = "approval"
    DISAPPROVAL = "disapproval"
    REGENERATE = "regenerate"
    CORRECTION = "correction"
    RATING = "rating"
    COMMENT = "comment"
    RANK = "rank"


class PolicyState(StrEnum):
    """Where a policy version is in its life; `bot.store.registry` holds the transitions."""

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
    """A place where people talk: a terminal, a channel, a thread, or an imported file's dialogue.

    `is_public`: everybody in its space may read it.
    """

    platform: str
    channel: str
    space: str = ""
    thread: str = ""
    is_public: bool = False
    id: str = field(default_factory=new_id)


@dataclass(frozen=True)
class Message:
    """One message of a conversation. `event_id` is the platform's id of the event that brought it, claimed once.

    `author_name` is what people saw its author called when it was written; "" where nobody else is there.
    Of a message that was erased (`bot.store.forgetting`) only its place is left: its author is FORGOTTEN, its text empty.
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
        """Whether only the message's place is left."""
        return self.author_id == FORGOTTEN


@dataclass(frozen=True)
class Reply:
    """What the policy said, and all that made it.

    `prompt_ids` and `completion_ids` are the exact token ids; `logprobs` holds the log-probability (nats) under the
    sampling distribution of each of the `completion_ids`.
    """

    text: str
    policy_version: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    sampling: dict[str, Any]
    latency_ms: float


@dataclass(frozen=True)
class FollowUp:
    """A message that its author wrote after an answer: how likely it is each kind of thing said about that answer."""

    turn_id: str
    message_id: str
    chances: dict[str, float]

    @property
    def kind(self) -> str:
        """What it most likely is."""
        return max(self.chances, key=lambda kind: self.chances[kind])


@dataclass(frozen=True)
class StoredMessage:
    """A message that is committed, where it was said, and whether its event is new."""

    message: Message
    place: Conversation
    is_new: bool


@dataclass(frozen=True)
class Turn:
    """One answer in a conversation: the message that it answers, and what made it.

    An imported turn was not sampled by us: its `policy_version` is "imported" and its ids and log-probabilities are
    None. `replaces` names the turn that was regenerated. `shown` holds the ids of the earlier messages that the policy was
    shown: those of the recent window with None, those that were remembered with their similarity to the question.
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
    sampling: dict[str, Any]
    latency_ms: float
    replaces: str | None = None
    shown: dict[str, float | None] = field(default_factory=dict)
    at: datetime = field(default_factory=now)
    id: str = field(default_factory=new_id)

    @property
    def sources(self) -> set[str]:
        """The ids of the messages that it was made from: its question, and what the policy was shown."""
        return {self.message_id, *self.shown}

    @property
    def remembered(self) -> dict[str, float]:
        """Of what was shown, what came from long ago or elsewhere, with its similarity to the question."""
        return {message: score for message, score in self.shown.items() if score is not None}


@dataclass(frozen=True)
class Feedback:
    """One act of one person about one turn: given, or taken back (`retracts`).

    `signal` is what was used to say it (an emoji, a button, a command), so that taking back ❤️ leaves 👍 standing.
    `value` is the rank for RANK and a number in [-1, 1] for RATING; `text` is the wanted answer for CORRECTION and what
    was said for COMMENT.
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


Time = Annotated[datetime, PlainSerializer(datetime.isoformat)]  # in a Record


class Record(BaseModel):
    """What is kept as JSON, typed. A key that was never said stays away from the JSON; one that is not known is kept, since
    another version of kibitz wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `as_json` gave. Raises pydantic's ValidationError, a ValueError, where that does not fit."""
        return cls.model_validate(values)

    def as_json(self) -> dict[str, Any]:
        """Return what was said, and no defaults."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    def __or__(self, other: "Record") -> Self:
        """Return this with all that `other` says, which goes before what this says of the same."""
        return self.from_json(self.as_json() | other.as_json())


class Metrics(Record):
    """What is recorded of a policy version: the verdict on it, and what the life of versions depends on.

    `judged_against` is the version that was live then, `drawn_at` when the rows that it learned from were drawn, `judged_at`
    when the opinions that judged it were. `gain` is what its answers gain, in rewards; `kl` is nats a token, to the base.
    What else a run measured (`learning.judging.metrics`) is kept with it.
    """

    reasons: list[str] = []  # why it does not serve
    outcome: str = ""  # why its run ended without a verdict
    judged_against: str | None = None
    drawn_at: Time | None = None
    judged_at: Time | None = None
    waits_for: int = 0  # reactions after `drawn_at`
    had_enough_evidence: bool = False
    is_better: bool = False
    kl: float | None = None
    gain: float | None = None
    live_before: str | None = Field(  # of a base model that made way for another: the version that was live
        default=None,
        validation_alias="live when the base model was changed",
        serialization_alias="live when the base model was changed",
    )


@dataclass(frozen=True)
class PolicyVersion:
    """One immutable version of the policy: the base model (version 0), an adapter on it, or weights of its own.

    `parent` is the version that its training continued, `replaced` the one that was live when it was promoted.
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
        """Whether it is a base model itself."""
        return self.parent is None

    @property
    def judged_against(self) -> str | None:
        """The name of the version that was live when it was judged: its verdict holds beside that one alone."""
        return self.metrics.judged_against or self.parent

    @property
    def awaited_reactions(self) -> int:
        """How many reactions must come after `drawn_at` until its evidence is looked at again, while it is WAITING."""
        return self.metrics.waits_for

    @property
    def drawn_at(self) -> datetime | None:
        """When the rows that it learned from were drawn; None where nothing is recorded."""
        return self.metrics.drawn_at

    @property
    def judged_at(self) -> datetime | None:
        """When the opinions that judged it were drawn; None for a base model, which nobody judged."""
        return self.metrics.judged_at

    @property
    def weights(self) -> str | None:
        """The directory of its own weights; None for a base model."""
        return None if self.is_base else self.path
