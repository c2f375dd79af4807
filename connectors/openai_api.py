"""The shapes of the OpenAI chat API, and of feedback as TensorZero's users know it. It knows no server and no store."""

import json
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, Field, ValidationError, model_validator

from bot.dialogue import spoken
from bot.errors import DataError
from bot.types import Feedback, FeedbackKind, Turn


class TextPart(BaseModel):
    """A piece of a message; only text is read."""

    type: str = "text"
    text: str = ""


class ChatMessage(BaseModel):
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The message's text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream also tells."""

    include_usage: bool = False


class Completion(BaseModel):
    """A request for an answer. Sampling settings of the client are not followed: they are those that training assumes.

    `conversation` names a conversation whose history kibitz keeps; `regenerates` a completion that was not wanted.
    """

    messages: list[ChatMessage] = []
    model: str = "kibitz"
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: int | None = None
    user: Annotated[str, Field(max_length=64)] = ""
    conversation: Annotated[str, Field(max_length=64)] = ""
    regenerates: str = ""

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "Completion":
        if not self.regenerates and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("the last of messages must be the user's")
        return self


class FeedbackRequest(BaseModel):
    """What somebody thinks of a completion: `value` is true or false, a number in [-1, 1], or text.

    Text is a comment where `metric_name` is "comment", and what should have been said where it is "demonstration".
    """

    inference_id: Annotated[str, Field(validation_alias=AliasChoices("inference_id", "completion_id"))]
    metric_name: Annotated[str, Field(max_length=64)] = "rating"
    value: bool | float | str
    user: Annotated[str, Field(max_length=64)] = ""

    @model_validator(mode="after")
    def _has_a_meaning(self) -> "FeedbackRequest":
        textual = self.metric_name in ("comment", "demonstration")
        if isinstance(self.value, str) != textual:
            raise ValueError("value must be text for comment and demonstration, and a boolean or a number for all else")
        if textual and not str(self.value).strip():
            raise ValueError("value is empty; say something")
        if isinstance(self.value, float) and not -1 <= self.value <= 1:
            raise ValueError("value must be in [-1, 1]")
        return self

    def feedback(self, turn_id: str, user: str) -> Feedback:
        """The act of feedback that this is."""
        if isinstance(self.value, bool):
            kind = FeedbackKind.APPROVAL if self.value else FeedbackKind.DISAPPROVAL
            return Feedback(turn_id, user, kind, signal=self.metric_name)
        if isinstance(self.value, str):
            kind = FeedbackKind.COMMENT if self.metric_name == "comment" else FeedbackKind.CORRECTION
            return Feedback(turn_id, user, kind, signal=self.metric_name, text=self.value)
        return Feedback(turn_id, user, FeedbackKind.RATING, signal=self.metric_name, value=self.value)


class Privacy(BaseModel):
    """Whether somebody may be learned from."""

    consent: bool


Shape = TypeVar("Shape", bound=BaseModel)


def parsed(shape: type[Shape], body: bytes) -> Shape:
    """A request body as `shape`. Raises DataError with one line."""
    try:
        return shape.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where or 'body'}: {first['msg']}") from error


def completion(turn: Turn) -> dict[str, Any]:
    """A turn as a chat completion."""
    prompt, answer = len(turn.prompt_ids or ()), len(turn.completion_ids or ())
    return {
        **_frame(turn.id, "chat.completion"),
        "system_fingerprint": turn.policy_version,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": spoken(turn)}, "finish_reason": _reason(turn)}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }


def chunk(turn_id: str, delta: dict[str, str], turn: Turn | None = None) -> str:
    """One server-sent event of a streamed completion; the last one carries the finished turn."""
    choice = {"index": 0, "delta": delta, "finish_reason": None if turn is None else _reason(turn)}
    ended = {} if turn is None else {"system_fingerprint": turn.policy_version}
    return f"data: {json.dumps({**_frame(turn_id, 'chat.completion.chunk'), **ended, 'choices': [choice]})}\n\n"


def _frame(turn_id: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{turn_id}", "object": kind, "created": int(time.time()), "model": "kibitz"}


def _reason(turn: Turn) -> str:
    return "length" if turn.finish_reason == "length" else "stop"
