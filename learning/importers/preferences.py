"""Preferences: read TRL's rows of liked and disliked answers.

A KTO row has a prompt, a completion and a label. A DPO row has two answers to one prompt, one of them chosen. Prompts and
answers are texts or lists of messages. A DPO row may have its prompt only inside both answers.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, Field

from bot.types import FeedbackKind, Role
from learning.importers.chat_messages import RatedMessage, add_chat, read_chat
from learning.importers.ratings import find_rating
from learning.importers.recorded_files import RecordedRow
from learning.importers.recording import OddRow, Recording

TRANSCRIPT = re.compile(r"\s*(?:^|\n\n)(Human|Assistant): ")  # marks the speakers in Anthropic's preference data


class CompletionRow(BaseModel):
    """A row of TRL's unpaired data."""

    prompt: str | list[Any]
    completion: Annotated[str | list[Any] | dict[str, Any], Field(validation_alias=AliasChoices("completion", "response"))]


class Preference(BaseModel):
    """A row of TRL's paired data."""

    prompt: str | list[Any] | None = None
    chosen: str | list[Any] | dict[str, Any]
    rejected: str | list[Any] | dict[str, Any]


def read_completion(row: RecordedRow, recording: Recording) -> None:
    """Read one row of KTO."""
    found = CompletionRow.model_validate(row.value)
    said = read_chat(found.prompt, Role.USER, recording, row)
    said += read_chat(found.completion, Role.ASSISTANT, recording, row)
    draft = recording.start_draft(row.place)
    _, turn = add_chat(draft, said)
    if turn is None or said[-1].role != Role.ASSISTANT:
        raise OddRow("has no answer to its prompt")
    rating = find_rating(row.value)
    if rating is None:
        recording.leave_out("conversation without a rating", row.place)
    else:
        draft.add_rating(turn, rating)
    recording.add(draft, row)


def read_preference(row: RecordedRow, recording: Recording) -> None:
    """Read one row of DPO. The chosen answer gets an approval, the rejected one a disapproval."""
    found = Preference.model_validate(row.value)
    chosen, rejected = (_read_transcript(one, recording, row) for one in (found.chosen, found.rejected))
    prompt = read_chat(found.prompt, Role.USER, recording, row) if found.prompt else []
    if not prompt and len(chosen) == len(rejected) == 1:
        prompt, chosen, rejected = _split_texts(chosen[0].text, rejected[0].text)
    elif any(one.role == Role.USER for one in chosen):  # the answers are whole chats that contain the prompt
        shared = _count_shared(chosen, rejected)
        system = prompt[:1] if prompt and prompt[0].role == Role.SYSTEM and chosen[0].role != Role.SYSTEM else []
        prompt, chosen, rejected = [*system, *chosen[:shared]], chosen[shared:], rejected[shared:]
    if chosen == rejected:
        raise OddRow("has two identical answers")
    if not any(one.role == Role.USER for one in prompt):
        raise OddRow("has no prompt")
    draft = recording.start_draft(row.place)
    question, _ = add_chat(draft, prompt)
    for said, kind in ((chosen, FeedbackKind.APPROVAL), (rejected, FeedbackKind.DISAPPROVAL)):
        _, turn = add_chat(draft, said, question, start=len(draft.messages))
        if turn is None or said[-1].role != Role.ASSISTANT:
            raise OddRow("has no chosen answer" if kind == FeedbackKind.APPROVAL else "has no rejected answer")
        draft.add_feedback(turn, "rater", kind, "preference")
    recording.add(draft, row)


def _read_transcript(value: Any, recording: Recording, row: RecordedRow) -> list[RatedMessage]:
    """Return the messages of an answer, which may be the text of a whole chat."""
    parts = TRANSCRIPT.split(value) if isinstance(value, str) else []
    if len(parts) < 3 or parts[0].strip():
        return read_chat(value, Role.ASSISTANT, recording, row)
    roles = {"Human": Role.USER, "Assistant": Role.ASSISTANT}
    return [RatedMessage(roles[who], text.strip()) for who, text in zip(parts[1::2], parts[2::2], strict=True)]


def _split_texts(chosen: str, rejected: str) -> tuple[list[RatedMessage], list[RatedMessage], list[RatedMessage]]:
    """Split two texts into their common beginning, up to a whole word, and the rest of each."""
    end = chosen[: _count_shared(chosen, rejected)].rfind(" ") + 1
    prompt = [RatedMessage(Role.USER, chosen[:end].strip())] if chosen[:end].strip() else []
    return prompt, [RatedMessage(Role.ASSISTANT, chosen[end:])], [RatedMessage(Role.ASSISTANT, rejected[end:])]


def _count_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two sequences."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
