"""Recording: the conversations of a file, ready to be stored, and what was left out.

The readers of formats fill it, with one `Draft` per conversation. Ids are derived from the file and the place in it, so that
the same file gives the same rows. It does not depend on a format or a tokenizer.
"""

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from bot.chat.reactions import Reactions
from bot.store.conversations import DialogueRecord
from bot.types import Conversation, Feedback, FeedbackKind, Message, Role, SamplingParams, Turn
from bot.wording import count_noun
from learning.data.voices import IMPORT_PLATFORM
from learning.importers.recorded_files import RecordedRow

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # imported messages keep their order, but not their times
LONGEST_NAME = 128  # characters of a channel or a person in the database
LONGEST_SIGNAL = 64


class OddRow(Exception):
    """A row that cannot be read. `predicate` says why ("is not JSON"); `detail` shows what was found."""

    def __init__(self, predicate: str, detail: str = ""):
        super().__init__(predicate)
        self.predicate, self.detail = predicate, detail


class Draft:
    """One conversation while it is read. Its methods raise OddRow for a duplicate id."""

    def __init__(self, space: str, key: str):
        self.space, self.key = space, key
        channel = key if len(key) <= LONGEST_NAME else self.make_id("channel")
        self.conversation = Conversation(IMPORT_PLATFORM, channel=channel, space=space, id=self.make_id("conversation"))
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self.feedback: list[Feedback] = []
        self.ratings: list[tuple[str, Any]] = []  # (turn id, rating as it is written)
        self._names: set[str] = set()

    def make_id(self, name: str) -> str:
        """Return the id for a name in this conversation."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.space}/{self.key}/{name}"))

    def add_message(self, name: str, role: Role, text: str, reply_to: str | None, author: str = "") -> str:
        """Add a message; return its id."""
        if f"message {name}" in self._names:
            raise OddRow("has a duplicate message id", name)
        self._names.add(f"message {name}")
        author = (author or role.value)[:LONGEST_NAME]
        at = EPOCH + timedelta(seconds=len(self.messages))
        message = Message(self.conversation.id, author, text, role, reply_to, at=at, id=self.make_id(name))
        self.messages.append(message)
        return message.id

    def add_turn(self, name: str, question: str, reply: str, text: str, asker: str = "user", **recorded: Any) -> str:
        """Add a turn in which the message `reply` answers the message `question`; return its id."""
        if not self._names.isdisjoint({f"turn {name}", f"reply {reply}"}):
            raise OddRow("has a duplicate answer id", name)
        self._names |= {f"turn {name}", f"reply {reply}"}
        values: dict[str, Any] = {
            "policy_version": "imported",
            "prompt_ids": None,
            "completion_ids": None,
            "logprobs": None,
            "finish_reason": "stop",
            "sampling": SamplingParams(),
            "latency_ms": 0.0,
        }
        turn = Turn(
            conversation_id=self.conversation.id,
            message_id=question,
            reply_id=reply,
            text=text,
            asker_id=asker[:LONGEST_NAME],
            at=EPOCH + timedelta(seconds=len(self.messages)),
            id=self.make_id(f"turn {name}"),
            **{**values, **recorded},
        )
        self.turns.append(turn)
        return turn.id

    def add_feedback(self, turn: str, user: str, kind: FeedbackKind, signal: str, **details: Any) -> None:
        """Add one act of feedback on a turn."""
        count = len(self.feedback)
        values = {"at": EPOCH + timedelta(days=1, seconds=count), "id": self.make_id(f"feedback {count}"), **details}
        self.feedback.append(Feedback(turn, user[:LONGEST_NAME], kind, signal[:LONGEST_SIGNAL], **values))

    def add_unnamed_feedback(self, turn: str, people: int, kind: FeedbackKind, signal: str, **details: Any) -> None:
        """Add the same act by a number of `people` whom the file does not name.

        They get different names at each answer. If they were one person, `rewards.person_cap` would limit them, and the gate
        would compare their opinions only with each other.
        """
        for number in range(people):
            self.add_feedback(turn, f"unnamed {turn} {number} {signal}", kind, signal, **details)

    def add_rating(self, turn: str, rating: Any) -> None:
        """Keep the rating of a turn as it is written."""
        self.ratings.append((turn, rating))


@dataclass(frozen=True)
class RawRating:
    """A rating of an answer as it is written. The meaning of a number depends on all ratings of its file."""

    draft: Draft
    turn: str
    raw: Any
    place: str


@dataclass
class Recording:
    """The conversations of a file, ready to be stored, and what was left out.

    `reactions` says which emoji are opinions. `row_counts` counts rows by format. `dropped` counts what was left out by
    reason; `first_dropped` has the place and the detail of the first for each reason. `scales` has the rating scales of
    each file.
    """

    space: str
    reactions: Reactions
    dialogues: list[DialogueRecord] = field(default_factory=list)
    row_counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: dict[str, tuple[str, str]] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)
    tokenizer_sha256: str = ""
    ratings: dict[str, list[RawRating]] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)  # keys of the conversations

    def start_draft(self, key: str) -> Draft:
        """Return a new conversation with this key. `add` keeps it."""
        return Draft(self.space, key)

    def add(self, draft: Draft, row: RecordedRow) -> None:
        """Keep a conversation that starts in `row`. Raises OddRow if there is one with the same key."""
        if draft.key in self.keys:
            raise OddRow("has a duplicate conversation id", draft.key)
        self.keys.add(draft.key)
        self.dialogues.append((draft.conversation, draft.messages, draft.turns, draft.feedback))
        if draft.ratings:
            kept = self.ratings.setdefault(row.file, [])
            kept += [RawRating(draft, turn, raw, row.place) for turn, raw in draft.ratings]

    def leave_out(self, reason: str, place: str, detail: str = "", count: int = 1) -> None:
        """Count something as left out. `reason` is a noun phrase; `place` says where it was."""
        if count:
            self.dropped[reason] += count
            self.first_dropped.setdefault(reason, (place, detail[:80]))

    def explain(self, reason: str) -> str:
        """Describe what was left out for a reason: the first case, and how many more."""
        place, detail = self.first_dropped[reason]
        noun, _, predicate = reason.partition(" that ")
        what = f"{place} {predicate}" if noun in ("row", "file") else f"{place}: {reason}"
        more = self.dropped[reason] - 1
        return what + (f" ({detail})" if detail else "") + (f", and {more:,} more like it" if more else "")

    @contextmanager
    def leaving_out(self, place: str, noun: str = "row") -> Iterator[None]:
        """Suppress OddRow and ValidationError, and count the `noun` at `place` as left out."""
        try:
            yield
        except OddRow as odd:
            self.leave_out(f"{noun} that {odd.predicate}", place, odd.detail)
        except ValidationError as error:
            found = make_shape_error(error)
            self.leave_out(f"{noun} that {found.predicate}", place, found.detail)

    @property
    def format(self) -> str:
        """The names of the formats that were read."""
        return ", ".join(self.row_counts)

    @property
    def scale_summary(self) -> str:
        """The scales of the ratings, for people."""
        if len(set(self.scales.values())) > 1:
            return "; ".join(f"{file}: {scale}" for file, scale in self.scales.items())
        return next(iter(self.scales.values()), "")

    def count_feedback(self, kind: FeedbackKind) -> int:
        """Return the number of acts of one kind of feedback."""
        return sum(row.kind == kind and not row.retracts for *_, given in self.dialogues for row in given)

    @property
    def answer_count(self) -> int:
        """The number of answers."""
        return sum(len(turns) for _, _, turns, _ in self.dialogues)

    @property
    def counts(self) -> dict[str, int]:
        """The figures of the recording, with the keys of a replay's report."""
        return {
            "conversations": len(self.dialogues),
            "assistant_messages": self.answer_count,
            "approvals": self.count_feedback(FeedbackKind.APPROVAL),
            "disapprovals": self.count_feedback(FeedbackKind.DISAPPROVAL),
            "ranks": self.count_feedback(FeedbackKind.RANK),
        }

    def lines(self) -> list[str]:
        """Return lines for people: the formats, the figures, the scales, and what was left out."""
        rows = ", ".join(f"{name} ({count_noun(count, 'row')})" for name, count in self.row_counts.items())
        found = [f"format: {rows}", f"read: {format_counts(self.counts)}"]
        found += [f"ratings: {self.scale_summary}"] if self.scales else []
        return found + [f"left out: {self.explain(reason)}" for reason in self.first_dropped]

    def drop_token_ids(self) -> None:
        """Drop recorded token ids of another tokenizer, so that the texts are tokenized again."""
        self.dialogues = [
            (conversation, said, [turn.without_token_ids() for turn in turns], given)
            for conversation, said, turns, given in self.dialogues
        ]


def format_counts(counts: dict[str, int]) -> str:
    """Return counts as one line of text."""
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items())


def make_shape_error(error: ValidationError) -> OddRow:
    """Return an OddRow that describes the first validation error."""
    first = error.errors(include_url=False)[0]
    key = ".".join(part for part in first["loc"] if isinstance(part, str))
    if first["type"] == "missing":
        return OddRow(f"has no '{key}'")
    return OddRow(f"has a value of the wrong kind in '{key}'" if key else "has a value of the wrong kind", first["msg"])
