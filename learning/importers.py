"""Importers: recorded conversations with their reactions, read from a file; and the exporter whose files they read.

Three formats: kibitz's own export; OpenAI-style `messages` with ratings; OpenAssistant trees with `emojis` and `rank`.
A file is read whole before anything is stored, and everything that is left out is counted under a reason. Ids are derived
from the file, so that the same file gives the same rows. It knows no tokenizer and no training.
"""

import hashlib
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bot.config import PrivacyConfig
from bot.conversations import ConversationStore, Dialogue
from bot.errors import DataError
from bot.types import Conversation, Feedback, FeedbackKind, Message, Role, Turn
from bot.users import Users
from learning.voices import IMPORTED, Consent

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # imported things have an order but no time of their own
EXPORT = "kibitz-export"
OASST_ROLES = {"prompter": Role.USER, "assistant": Role.ASSISTANT}
EMOJIS = {"+1": FeedbackKind.APPROVAL, "-1": FeedbackKind.DISAPPROVAL}


@dataclass
class Recording:
    """What a file held, ready to be stored, and what was left out."""

    space: str
    format: str
    dialogues: list[Dialogue] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    tokenizer_sha256: str = ""

    def forget_ids(self) -> None:
        """Drop recorded token ids, which are another tokenizer's; the texts stay and are tokenized anew."""
        self.dialogues = [
            (
                conversation,
                said,
                [replace(turn, prompt_ids=None, completion_ids=None, logprobs=None) for turn in turns],
                given,
            )
            for conversation, said, turns, given in self.dialogues
        ]

    def count(self, kind: FeedbackKind) -> int:
        """How many acts of one kind of feedback were read."""
        return sum(row.kind == kind and not row.retracts for *_, given in self.dialogues for row in given)

    @property
    def assistant_messages(self) -> int:
        """How many answers were read."""
        return sum(len(turns) for _, _, turns, _ in self.dialogues)


def _without_ids(turn: Turn) -> Turn:
    return replace(turn, prompt_ids=None, completion_ids=None, logprobs=None)


class _Builder:
    """Collects one conversation, with ids derived from the file and the place in it."""

    def __init__(self, space: str, key: str):
        self.space, self.key = space, key
        self.conversation = Conversation(IMPORTED, channel=key, space=space, id=self.id("conversation"))
        self.messages: list[Message] = []
        self.turns: list[Turn] = []
        self.feedback: list[Feedback] = []

    def id(self, name: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.space}/{self.key}/{name}"))

    def say(self, name: str, role: Role, text: str, reply_to: str | None) -> str:
        at = EPOCH + timedelta(seconds=len(self.messages))
        message = Message(self.conversation.id, role.value, text, role, reply_to, at=at, id=self.id(name))
        self.messages.append(message)
        return message.id

    def answer(self, name: str, question: str, reply: str, text: str, **recorded: Any) -> str:
        values: dict[str, Any] = {
            "policy_version": "imported",
            "prompt_ids": None,
            "completion_ids": None,
            "logprobs": None,
            "finish_reason": "stop",
            "sampling": {},
            "latency_ms": 0.0,
        }
        turn = Turn(
            conversation_id=self.conversation.id,
            message_id=question,
            reply_id=reply,
            text=text,
            asker_id=recorded.pop("asker_id", "user"),
            at=EPOCH + timedelta(seconds=len(self.messages)),
            id=self.id(f"turn {name}"),
            **{**values, **recorded},
        )
        self.turns.append(turn)
        return turn.id

    def react(self, turn: str, user: str, kind: FeedbackKind, **details: Any) -> None:
        count = len(self.feedback)
        values = {"at": EPOCH + timedelta(days=1, seconds=count), "id": self.id(f"feedback {count}"), **details}
        self.feedback.append(Feedback(turn, user, kind, **values))

    def dialogue(self) -> Dialogue:
        return self.conversation, self.messages, self.turns, self.feedback


def read(path: Path, format: str = "auto") -> Recording:
    """Read a file of recorded conversations. Raises DataError that names the line and what is wrong with it."""
    try:
        raw = path.read_bytes()
        lines = [(number, line) for number, line in enumerate(raw.decode("utf-8").splitlines(), 1) if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    if not lines:
        raise DataError(f"{path}: is empty; give a file with one conversation a line")
    parsed = [(number, _parse(path, number, line)) for number, line in lines]
    found = _detect(parsed[0][1]) if format == "auto" else format
    if found not in READERS:
        raise DataError(f"{path}: line 1 is of no known format; name one with --format ({', '.join(sorted(READERS))})")
    recording = Recording(hashlib.sha256(raw).hexdigest()[:16], found)
    reader = READERS[found]
    for number, row in parsed:
        try:
            reader(recording, number, row)
        except DataError as error:
            raise DataError(f"{path}: line {number}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"has a value of the wrong kind ({error})"
            raise DataError(f"{path}: line {number} {what}; it is not a line of format {found}") from error
    return recording


def export(store: ConversationStore, path: Path, tokenizer_sha256: str, privacy: PrivacyConfig) -> Counter[str]:
    """Write every conversation to a file that `read` reads, with the feedback that may teach; returns what was written."""
    written: Counter[str] = Counter()
    users = Users(store.database, privacy)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps({EXPORT: 1, "tokenizer_sha256": tokenizer_sha256}) + "\n")
        for conversation, messages, turns, feedback in store.dialogues():
            authors = {message.id: message.author_id for message in messages if message.role == Role.USER}
            consent = Consent(users, {conversation.id: conversation.platform}, authors)
            teaching = {turn.id: turn for turn in turns if consent.to(turn)}
            feedback = [
                one for one in feedback if one.turn_id in teaching and consent.of(teaching[one.turn_id], one.user_id)
            ]
            row = {
                "conversation": asdict(conversation),
                "messages": [asdict(one) for one in messages],
                "turns": [asdict(one) for one in turns],
                "feedback": [asdict(one) for one in feedback],
            }
            file.write(json.dumps(row, default=datetime.isoformat, ensure_ascii=False) + "\n")
            written.update(conversations=1, messages=len(messages), turns=len(turns), feedback=len(feedback))
    unfinished.rename(path)
    return written


def _read_kibitz(recording: Recording, number: int, row: dict[str, Any]) -> None:
    if EXPORT in row:
        recording.tokenizer_sha256 = row["tokenizer_sha256"]
        return
    builder = _Builder(recording.space, row["conversation"]["id"])
    ids: dict[str, str] = {}
    for message in row["messages"]:
        reply_to = ids.get(message["reply_to"] or "")
        ids[message["id"]] = builder.say(message["id"], _role(message["role"]), message["text"], reply_to)
    for turn in row["turns"]:
        names = ("policy_version", "finish_reason", "sampling", "latency_ms", "asker_id")
        recorded = {name: turn[name] for name in names}
        for name in ("prompt_ids", "completion_ids", "logprobs"):
            recorded[name] = None if turn[name] is None else tuple(turn[name])
        if turn["replaces"]:
            recorded["replaces"] = ids.get(turn["replaces"])
        text = turn["text"]
        ids[turn["id"]] = builder.answer(turn["id"], ids[turn["message_id"]], ids[turn["reply_id"]], text, **recorded)
    for given in row["feedback"]:
        details = {name: given[name] for name in ("signal", "retracts", "value", "text")}
        at = datetime.fromisoformat(given["at"])
        builder.react(ids[given["turn_id"]], given["user_id"], FeedbackKind(given["kind"]), at=at, **details)
    recording.dialogues.append(builder.dialogue())


def _read_openai(recording: Recording, number: int, row: dict[str, Any]) -> None:
    builder = _Builder(recording.space, f"line {number}")
    previous: str | None = None
    last_turn: str | None = None
    for index, message in enumerate(row["messages"]):
        role, text = _role(message["role"]), message["content"]
        if not isinstance(text, str):
            raise DataError(f"message {index + 1} has content that is no text; only text can be replayed")
        said = builder.say(str(index), role, text, previous)
        if role == Role.ASSISTANT and previous is not None:
            last_turn = builder.answer(str(index), previous, said, text)
            if "rating" in message:
                _rate(builder, last_turn, message["rating"])
        previous = said
    if "rating" in row:
        if last_turn is None:
            raise DataError("has a rating but no answer to a message; add the assistant's message")
        _rate(builder, last_turn, row["rating"])
    if not builder.feedback:
        recording.dropped["conversation without a rating"] += 1
    recording.dialogues.append(builder.dialogue())


def _rate(builder: _Builder, turn: str, rating: Any) -> None:
    words = {True: 1, False: -1, "up": 1, "down": -1, "good": 1, "bad": -1}
    value = words.get(rating, rating) if isinstance(rating, bool | str) else rating
    if not isinstance(value, int | float) or not -1 <= value <= 1:
        raise DataError(f"rating has value {rating!r}; it must be true, false, 'up', 'down' or a number in [-1, 1]")
    if value:
        kind = FeedbackKind.APPROVAL if value > 0 else FeedbackKind.DISAPPROVAL
        builder.react(turn, "rater", kind, signal="rating", value=float(value))


def _read_oasst(recording: Recording, number: int, row: dict[str, Any]) -> None:
    builder = _Builder(recording.space, row["message_tree_id"])
    pending: list[tuple[dict[str, Any], str | None]] = [(row["prompt"], None)]
    while pending:
        node, parent = pending.pop()
        if node["role"] not in OASST_ROLES:
            raise DataError(f"message {node['message_id']} has role {node['role']!r}; known are prompter and assistant")
        role = OASST_ROLES[node["role"]]
        if node.get("deleted"):
            recording.dropped["deleted message, with the replies to it"] += 1
            continue
        said = builder.say(node["message_id"], role, node["text"], parent)
        emojis = Counter(node.get("emojis") or {})
        if role == Role.ASSISTANT and parent is not None:
            turn = builder.answer(node["message_id"], parent, said, node["text"])
            for emoji, kind in EMOJIS.items():
                for person in range(emojis.pop(emoji, 0)):  # the file counts people but does not name them
                    builder.react(turn, f"oasst {emoji} {person}", kind, signal=emoji)
            if node.get("rank") is not None:
                builder.react(turn, "oasst ranking", FeedbackKind.RANK, signal="rank", value=float(node["rank"]))
        for emoji, count in emojis.items():
            where = "on a user's message" if emoji in EMOJIS else "which is a tool's action, no reaction"
            recording.dropped[f"{emoji} {where}"] += count
        pending += [(reply, said) for reply in reversed(node.get("replies") or [])]
    recording.dialogues.append(builder.dialogue())


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not JSON ({error}); mend or remove that line") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is no JSON object; each line must be one conversation")
    return row


def _detect(row: dict[str, Any]) -> str:
    marks = {EXPORT: "kibitz", "message_tree_id": "oasst", "messages": "openai"}
    return next((name for key, name in marks.items() if key in row), "")


def _role(name: str) -> Role:
    try:
        return Role(name)
    except ValueError:
        raise DataError(f"role {name!r} is not known; known are {', '.join(Role)}") from None


def pairs(path: Path) -> Iterator[list[dict[str, str]]]:
    """Prompt-response pairs for the warm start: JSON lines of openai `messages`, or the Cornell Movie Dialogs folder."""
    yield from _cornell(path) if path.is_dir() else _messages(path)


def _messages(path: Path) -> Iterator[list[dict[str, str]]]:
    for _, said, _, _ in read(path, "openai").dialogues:
        dialogue = [{"role": message.role.value, "content": message.text} for message in said]
        if len(dialogue) > 1 and dialogue[-1]["role"] == Role.ASSISTANT:
            yield dialogue


def _cornell(folder: Path) -> Iterator[list[dict[str, str]]]:
    """The corpus as published: movie_lines.txt and movie_conversations.txt, fields parted by ' +++$+++ '."""

    def fields(name: str) -> Iterator[list[str]]:
        try:
            text = (folder / name).read_text(encoding="iso-8859-1")
        except OSError as error:
            raise DataError(f"{folder}: {name} cannot be read ({error.strerror}); give the corpus's folder") from error
        yield from (line.split(" +++$+++ ") for line in text.splitlines() if line.strip())

    said = {row[0]: row[-1].strip() for row in fields("movie_lines.txt")}
    for row in fields("movie_conversations.txt"):
        ids = [part.strip(" '[]") for part in row[-1].split(",")]
        for question, answer in itertools.pairwise(ids):
            if said.get(question) and said.get(answer):
                yield [
                    {"role": "user", "content": said[question]},
                    {"role": "assistant", "content": said[answer]},
                ]


READERS: dict[str, Callable[[Recording, int, dict[str, Any]], None]] = {
    "kibitz": _read_kibitz,
    "openai": _read_openai,
    "oasst": _read_oasst,
}
