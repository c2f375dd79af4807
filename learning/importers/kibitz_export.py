"""kibitz's own export: write all conversations to a file of JSON lines, and read such files."""

import json
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bot import output_files
from bot.config import PrivacyConfig
from bot.records import Record
from bot.store.conversations import ConversationStore, DialogueRecord
from bot.store.registry import PolicyRegistry
from bot.store.users import Users
from bot.types import Conversation, Feedback, Message, Role, Turn
from learning.data.replay_buffer import without_foreign_ids
from learning.data.voices import Consent
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import OddRow, Recording

EXPORT_KEY = "kibitz-export"
VERSION = 1
TURN_FIELDS = (
    "policy_version",
    "prompt_ids",
    "completion_ids",
    "logprobs",
    "finish_reason",
    "sampling",
    "latency_ms",
    "selection",
)  # of a turn


class Header(BaseModel):
    """The first line of an export."""

    tokenizer_sha256: str = ""


class Line(BaseModel):
    """One conversation, a line of an export."""

    model_config = ConfigDict(allow_inf_nan=False)

    conversation: Conversation
    messages: list[Message]
    turns: list[Turn]
    feedback: list[Feedback]


def export(store: ConversationStore, path: Path, tokenizer_sha256: str, privacy: PrivacyConfig) -> Counter[str]:
    """Write all conversations to a file, as far as people consent. Return how much was written and left out.

    For people who do not consent, it leaves out their messages, their feedback, and the answers that were made from their
    words. The token ids are those of one tokenizer: answers of another base model are written without ids, as texts to
    tokenize anew. The file is either complete or absent. Raises DataError if it cannot be written.
    """
    written: Counter[str] = Counter()
    foreign = PolicyRegistry(store.database).find_foreign()
    users = Users(store.database, privacy)
    with output_files.replace(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps({EXPORT_KEY: VERSION, "tokenizer_sha256": tokenizer_sha256}) + "\n")
        for dialogue in store.read_dialogues():
            conversation, messages, turns, feedback = _keep_consenting(dialogue, store, users)
            written["messages left out (no consent, or erased)"] += len(dialogue[1]) - len(messages)
            if not messages:
                continue
            row = {
                "conversation": asdict(conversation),
                "messages": [asdict(one) for one in messages],
                "turns": [asdict(without_foreign_ids(one, foreign)) for one in turns],
                "feedback": [asdict(one) for one in feedback],
            }
            file.write(json.dumps(row, default=_as_json, ensure_ascii=False) + "\n")
            written.update(conversations=1, messages=len(messages), turns=len(turns), feedback=len(feedback))
    return +written


def _as_json(value: datetime | Record) -> Any:
    """Return what `json` writes for a value that it does not know."""
    return value.as_json() if isinstance(value, Record) else value.isoformat()


def _keep_consenting(dialogue: DialogueRecord, store: ConversationStore, users: Users) -> DialogueRecord:
    """Return the parts of a conversation that may be learned from."""
    conversation, messages, turns, feedback = dialogue
    consent = Consent(users, {conversation.id: conversation.platform}, store.find_authors_behind(turn.id for turn in turns))
    teaching = {turn.id: turn for turn in turns if consent.may_teach(turn)}
    silent = {turn.reply_id for turn in turns if turn.id not in teaching}
    silent |= {
        one.id
        for one in messages
        if one.is_forgotten or (one.role == Role.USER and not consent.is_given_by(one, one.author_id))
    }
    return (
        conversation,
        [one for one in messages if one.id not in silent],
        list(teaching.values()),
        [one for one in feedback if one.turn_id in teaching and consent.is_given_by(teaching[one.turn_id], one.user_id)],
    )


def read_export(row: RecordedRow, recording: Recording) -> None:
    """Read one line of an export."""
    if EXPORT_KEY in row.value:
        if row.value[EXPORT_KEY] != VERSION:
            raise OddRow(
                f"is from an export of version {str(row.value[EXPORT_KEY])[:20]}; this kibitz reads version {VERSION}"
            )
        recording.tokenizer_sha256 = Header.model_validate(row.value).tokenizer_sha256
        return
    line = Line.model_validate(row.value)
    draft = recording.start_draft(line.conversation.id)
    ids: dict[str, str] = {}
    for message in line.messages:
        reply_to = ids.get(message.reply_to or "")
        ids[message.id] = draft.add_message(message.id, message.role, message.text, reply_to)
    for turn in line.turns:
        if not {turn.message_id, turn.reply_id} <= ids.keys():
            raise OddRow("has an answer without its messages", turn.id)
        recorded = {name: getattr(turn, name) for name in TURN_FIELDS}
        replaces = ids.get(turn.replaces or "")
        question, reply = ids[turn.message_id], ids[turn.reply_id]
        shown = {ids[one]: score for one, score in turn.shown.items() if one in ids}
        ids[turn.id] = draft.add_turn(
            turn.id, question, reply, turn.text, turn.asker_id, replaces=replaces, shown=shown, **recorded
        )
    for given in line.feedback:
        if given.turn_id not in ids:
            raise OddRow("has feedback without its answer", given.turn_id)
        details = {name: getattr(given, name) for name in ("retracts", "value", "text", "at")}
        draft.add_feedback(ids[given.turn_id], given.user_id, given.kind, given.signal, **details)
    recording.add(draft, row)
