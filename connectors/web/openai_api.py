"""The shapes of the OpenAI chat API, and of feedback as TensorZero's users know it."""

import json
import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from bot.chat.dialogue import History, render_answer
from bot.errors import DataError
from bot.store.picks import PICK
from bot.types import Feedback, FeedbackKind, Reason, Role, Turn

MODEL = "kibitz"
UNSEEN = "(I can read text only; I have not seen what came with it.)\n\n"  # before an answer to a message with a picture
INT64 = 2**63


def _refuse_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("contains the character U+0000, which no database keeps; leave it out")
    return text


# A value that may have one of several types is checked here: pydantic would report each type that it tried.
def _as_list(given: Any) -> Any:
    if not isinstance(given, str | list):
        raise ValueError(f"must be a text or a list, not {json.dumps(given)[:40]}")
    return [given] if isinstance(given, str) else given


def _as_parts(given: Any) -> Any:
    return [{"text": given}] if isinstance(given, str) else _as_list(given)


def _check_value(given: Any) -> Any:
    if not isinstance(given, str | bool | int | float):
        raise ValueError(f"must be true, false, a number or a text, not {json.dumps(given)[:40]}")
    return given


Name = Annotated[str, Field(max_length=64), AfterValidator(_refuse_nul)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Shape(BaseModel):
    """A JSON object whose optional fields may be null: clients send null for what they do not set."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class ContentPart(Shape):
    """A part of a message."""

    type: str = "text"
    text: str = ""
    refusal: str = ""

    @property
    def is_text(self) -> bool:
        """Whether kibitz can read the part."""
        return self.type in ("text", "input_text", "output_text", "refusal")

    @property
    def visible_text(self) -> str:
        """The text that the policy is shown; the kind in brackets if the part is not text."""
        kind = self.type.removeprefix("input_").removesuffix("_url")
        return self.text or self.refusal if self.is_text else f"[{kind[:20]}]"


class ChatMessage(Shape):
    """One message of a chat. The results of tools and functions count as the user's words."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)] = []

    @property
    def text(self) -> str:
        """The text that the policy is shown. An answer has only the policy's own words."""
        text = "".join(part.visible_text for part in self.content)
        return text.removeprefix(UNSEEN) if self.speaker == Role.ASSISTANT else text

    @property
    def speaker(self) -> Role:
        """The role in which the policy sees the message."""
        match self.role:
            case "system" | "developer":
                return Role.SYSTEM
            case "assistant":
                return Role.ASSISTANT
            case _:
                return Role.USER


class StreamOptions(Shape):
    """What a stream includes besides the answer."""

    include_usage: bool = False


class ResponseFormat(Shape):
    """The requested form of an answer."""

    type: str = "text"


class CompletionRequest(Shape):
    """A request for an answer. Temperature and the like are ignored: training assumes the policy's own values.

    `conversation` names a conversation whose history kibitz keeps; `regenerates` names a completion to answer again.
    """

    messages: list[ChatMessage] = []
    model: str = MODEL
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_as_list)] = []
    n: int = 1
    tool_choice: Any = "auto"
    function_call: Any = "auto"
    response_format: ResponseFormat = ResponseFormat()
    user: Annotated[Name, Field(validation_alias=AliasChoices("user", "safety_identifier"))] = ""
    conversation: Name = ""
    regenerates: Name = ""

    @model_validator(mode="after")
    def _check_answerable(self) -> "CompletionRequest":
        if not self.messages and not self.regenerates:
            raise ValueError("messages is empty; send at least one")
        if self.n != 1:
            raise ValueError("n must be 1: kibitz gives one answer at a time; ask again for another")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in ("auto", "none"):
                raise ValueError(f"{name} must be 'auto' or 'none': kibitz calls no tools")
        if self.response_format.type != "text":
            raise ValueError("response_format.type must be 'text': kibitz cannot promise JSON")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens that the answer may have, or None."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts before which the answer ends."""
        return tuple(self.stop)

    @property
    def has_unseen(self) -> bool:
        """Whether the user's messages since the last answer hold something that kibitz cannot read."""
        said = [one for one in self.messages if one.speaker != Role.SYSTEM]
        while said and said[-1].speaker == Role.USER:
            if not all(part.is_text for part in said.pop().content):
                return True
        return False

    def split_question(self) -> tuple[str, History]:
        """Return the question, and its history.

        The question is the last message of the user; system messages after it join the history. System messages after
        an answer are the question. An answer at the end is to be continued.
        """
        said = [one for one in self.messages if one.text.strip()]
        notes: list[ChatMessage] = []
        while said and said[-1].speaker == Role.SYSTEM:
            notes.insert(0, said.pop())
        if notes and (not said or said[-1].speaker == Role.ASSISTANT):
            return "\n".join(note.text for note in notes), _history(said)
        begun: list[str] = []
        while said and said[-1].speaker == Role.ASSISTANT:
            begun.insert(0, said.pop().text)
        question = said.pop().text if said and said[-1].speaker == Role.USER else ""
        return question, _history([*said, *notes], "\n".join(begun))


class FeedbackRequest(Shape):
    """Feedback on a completion: `value` is true or false (or 1 or 0), a number in [-1, 1], or text.

    Text is a comment if `metric_name` is "comment", a correction if it is "demonstration", and the value of a `Reason` if it
    is "reason". With "pick", true means that a second answer is better, and false that the one which it replaces is.
    `episode_id`, in place of `inference_id`, means the last answer in a conversation. With `dryrun` nothing is recorded.
    """

    inference_id: Annotated[Name, Field(validation_alias=AliasChoices("inference_id", "completion_id"))] = ""
    episode_id: Name = ""
    metric_name: Name = "rating"
    value: Annotated[StrictBool | StrictInt | StrictFloat | str, BeforeValidator(_check_value)]
    user: Name = ""
    dryrun: bool = False

    @model_validator(mode="after")
    def _check_meaning(self) -> "FeedbackRequest":
        if bool(self.inference_id) == bool(self.episode_id):
            raise ValueError("give either inference_id, the id of a completion, or episode_id")
        textual = self.metric_name in ("comment", "demonstration", "reason")
        if isinstance(self.value, str) != textual:
            raise ValueError(
                "value must be text for comment, demonstration and reason, and a boolean or a number for all else"
            )
        if textual and not str(self.value).strip():
            raise ValueError("value is empty; say something")
        if self.metric_name == "reason" and self.value not in list(Reason):
            raise ValueError(f"value must be one of {', '.join(Reason)}; for other reasons send a comment")
        if self.is_pick and self.value not in (0, 1):
            raise ValueError("value of a pick must be true (the new answer is better) or false (the earlier one is)")
        if not isinstance(self.value, str) and not -1 <= self.value <= 1:
            raise ValueError("value must be in [-1, 1]")
        if isinstance(self.value, float) and self.value == 0:
            raise ValueError("value is 0.0, which is neither good nor bad and teaches nothing; for a dislike send false")
        return self

    @property
    def is_pick(self) -> bool:
        """Whether it compares an answer with the one that it replaces."""
        return self.metric_name == PICK

    def make_feedback(self, turn_id: str, user: str) -> Feedback:
        """Return the feedback to record, if it is not a pick."""
        if self.metric_name == "reason":
            reason = Reason(str(self.value))
            return Feedback(turn_id, user, FeedbackKind.COMMENT, reason.signal, text=str(reason))
        if isinstance(self.value, str):
            kind = FeedbackKind.COMMENT if self.metric_name == "comment" else FeedbackKind.CORRECTION
            return Feedback(turn_id, user, kind, signal=self.metric_name, text=self.value)
        if self.value in (0, 1) and not isinstance(self.value, float):
            kind = FeedbackKind.APPROVAL if self.value else FeedbackKind.DISAPPROVAL
            return Feedback(turn_id, user, kind, signal=self.metric_name)
        return Feedback(turn_id, user, FeedbackKind.RATING, signal=self.metric_name, value=float(self.value))


class PrivacyDecision(BaseModel):
    """A person's decision whether kibitz may learn from them."""

    consent: bool


class PersonQuery(BaseModel):
    """The person that a request is about, if its client tells people apart; "" for the client itself."""

    user: Name = ""


Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(shape: type[Parsed], given: bytes | dict[str, str]) -> Parsed:
    """Return a request's body or query as `shape`. Raises DataError, with one line, if it does not fit."""
    try:
        return shape.model_validate(given) if isinstance(given, dict) else shape.model_validate_json(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] != "value_error":
            raise DataError(f"{where or 'body'}: {first['msg']}") from error
        told = str(first["ctx"]["error"])  # our own words
        raise DataError(f"{where}: {told}" if where else told) from error


def model_card() -> dict[str, Any]:
    """Return the description of the only model."""
    return {"id": MODEL, "object": "model", "created": 0, "owned_by": MODEL}


def make_completion(turn: Turn, before: str = "") -> dict[str, Any]:
    """Return a turn as a chat completion, with our own words `before` its text."""
    prompt, answer = len(turn.prompt_ids or ()), len(turn.completion_ids or ())
    said = {"role": "assistant", "content": before + render_answer(turn)}
    return {
        **_frame(turn.id, "chat.completion"),
        "system_fingerprint": turn.policy_version,
        "episode_id": turn.conversation_id,
        "choices": [{"index": 0, "message": said, "finish_reason": _map_finish_reason(turn)}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer},
    }


def make_chunk(turn_id: str, delta: dict[str, str], turn: Turn | None = None) -> str:
    """Return one server-sent event of a streamed completion. The last one has the finished `turn`."""
    choice = {"index": 0, "delta": delta, "finish_reason": None if turn is None else _map_finish_reason(turn)}
    ended = {} if turn is None else {"system_fingerprint": turn.policy_version, "episode_id": turn.conversation_id}
    return f"data: {json.dumps({**_frame(turn_id, 'chat.completion.chunk'), **ended, 'choices': [choice]})}\n\n"


def _history(before: list[ChatMessage], begun: str = "") -> History:
    return History([{"role": one.speaker.value, "content": one.text} for one in before], begun)


def _frame(turn_id: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{turn_id}", "object": kind, "created": int(time.time()), "model": MODEL}


def _map_finish_reason(turn: Turn) -> str:
    return "length" if turn.finish_reason == "length" else "stop"
