"""Template: finds out which chats a model's chat template accepts, and brings any conversation into such a shape.

Each family of models has its own rules: no system message, or one only at the beginning; strict turns of user and assistant;
a user's message first, or at least one. Some templates refuse a chat that breaks a rule, others silently drop messages. So
nothing is assumed: a Template renders small trial chats when it is made.
"""

import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from inspect import signature

from bot.errors import ConfigError, TemplateError, quote_error
from bot.wording import count_noun

ChatMessages = Sequence[Mapping[str, str]]
Scalar = bool | int | float | str

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
BLANK = "…"  # replaces an empty text if the template does not accept one
TRIAL_SECONDS = 20.0  # of processor time for all trial chats, which take a few milliseconds
THINKING_SWITCHES = ("enable_thinking", "thinking")  # names that templates use for the switch for thoughts

# The texts of trial chats.
TRIAL_PERSONA, TRIAL_QUESTION, TRIAL_ANSWER, TRIAL_REMARK, TRIAL_ADDITION = (
    "Trial persona",
    "Trial question",
    "Trial answer",
    "Trial remark",
    "Trial addition",
)


@dataclass(frozen=True)
class Rules:
    """The chats that a template accepts without raising an error and without dropping a text."""

    may_have_system: bool  # a system message at the beginning
    may_repeat_role: bool  # two messages of one role side by side
    may_begin_with_answer: bool  # an assistant's message before the first user's
    may_end_with_answer: bool  # an assistant's message at the end, before the opening of the next answer
    may_lack_user: bool  # a chat without a user's message
    may_be_empty: bool  # no messages at all
    may_have_empty_text: bool  # a message without text


STRICTEST = Rules(*[False] * len(fields(Rules)))


class Template:
    """One chat template with its arguments. `apply` renders a list of messages, as `apply_chat_template` does."""

    def __init__(self, apply: Callable[..., str], arguments: Mapping[str, Scalar] | None = None, model: str = ""):
        """Render the trial chats.

        Raises ConfigError if the template refuses a single message or does not end, or if an argument has no effect.
        """
        self._apply = apply
        self._model = model
        self.arguments: dict[str, Scalar] = dict(arguments or {})
        try:
            with _limit_computing(TRIAL_SECONDS):
                self._check_arguments()
                if self.is_thinking is None:  # people who chat wait for an answer, not for thoughts
                    self.arguments |= {name: False for name in THINKING_SWITCHES if self._has_switch(name)}
                self.rules = self._find_rules()
        except _Endless:
            raise ConfigError(
                f"config key policy.model has value '{model}', whose chat template did not end within {TRIAL_SECONDS:g} s "
                "on a chat of a few lines; correct chat_template.jinja, or use another model"
            ) from None

    @property
    def is_thinking(self) -> bool | None:
        """Whether thoughts are switched on; None if no switch is set."""
        given = [self.arguments[name] for name in THINKING_SWITCHES if name in self.arguments]
        return any(given) if given else None

    def shape(self, messages: ChatMessages, *, is_prompt: bool = True) -> list[dict[str, str]]:
        """Bring any conversation into a shape that the template accepts. Shaping the result again changes nothing.

        System texts are joined at the beginning, or in the first user's message if the template has no system messages. If
        it wants strict turns, neighbouring messages of one role are merged. If it wants a user's message first, answers
        before that message are dropped, unless there is none at all.
        """
        return _shape(messages, self.rules, is_prompt)

    def render(self, messages: ChatMessages, *, is_prompt: bool = True) -> str:
        """Render any conversation, with the opening of the next answer if `is_prompt`.

        Raises TemplateError if the template refuses even the newest message alone.
        """
        system = [said for said in messages if said["role"] == SYSTEM]
        newest = [said for said in messages if said["role"] not in (SYSTEM, ASSISTANT)][-1:]
        wanted = [said["content"].strip() for said in (*system, *newest)]
        rendered = []
        for chat, rules in (
            (messages, self.rules),
            (messages, replace(self.rules, may_have_system=False)),  # some drop system texts, but only in some chats
            (messages, STRICTEST),  # the trial chats missed a rule
            ([*system, *newest], STRICTEST),
        ):
            text = self._try(_shape(chat, rules, is_prompt), is_prompt)
            if text is not None:
                if all(said in text for said in wanted):
                    return text
                rendered.append(text)
        if not rendered:
            raise TemplateError(
                f"the chat template of '{self._model}' refuses a conversation of "
                f"{count_noun(len(messages), 'message')}, and its newest message alone; see policy.template_args, or use "
                "another model"
            )
        return rendered[0]  # the template alters texts

    def _try(self, chat: ChatMessages, is_prompt: bool = True, arguments: Mapping[str, Scalar] | None = None) -> str | None:
        """Render a chat; return None if the template refuses it."""
        given = self.arguments if arguments is None else arguments
        try:
            text = self._apply([dict(said) for said in chat], add_generation_prompt=is_prompt, **given)
        except Exception:  # a template is foreign code: it may raise anything
            return None
        return text if isinstance(text, str) else None

    def _accepts(self, *chat: tuple[str, str], is_prompt: bool = True) -> bool:
        """Tell whether the template renders a chat of (role, text) and keeps every text."""
        text = self._try(_make_chat(*chat), is_prompt)
        return text is not None and all(said in text for _, said in chat)

    def _find_rules(self) -> Rules:
        asked, answered, next_asked = (USER, TRIAL_QUESTION), (ASSISTANT, TRIAL_ANSWER), (USER, TRIAL_REMARK)
        persona, accepts = (SYSTEM, TRIAL_PERSONA), self._accepts
        system = accepts(persona, asked) and accepts(persona, asked, answered, next_asked)
        start = [persona] if system else []
        return Rules(
            may_have_system=system,
            may_repeat_role=accepts(*start, asked, next_asked)
            and accepts(asked, answered, (ASSISTANT, TRIAL_ADDITION), next_asked),
            may_begin_with_answer=accepts(answered, asked) and accepts(*start, answered, asked),
            may_end_with_answer=accepts(asked, answered) and accepts(*start, asked, answered),
            may_lack_user=accepts(answered)
            and accepts(*start, answered)
            and (not system or (accepts(persona) and accepts(persona, is_prompt=False))),
            may_be_empty=accepts(),
            may_have_empty_text=accepts((USER, "")) and accepts(asked, (ASSISTANT, ""), next_asked),
        )

    def _check_arguments(self) -> None:
        """Raise ConfigError unless the template accepts a user's message with the arguments, and each has an effect."""
        whose = f"config key policy.model has value '{self._model}'"
        own = {name for name, one in signature(self._apply).parameters.items() if one.kind is not one.VAR_KEYWORD}
        for name in own & self.arguments.keys():
            raise ConfigError(
                f"config key policy.template_args.{name} has value {self.arguments[name]!r}, and kibitz or transformers "
                f"sets {name} itself; remove it"
            )
        if self._accepts((USER, TRIAL_QUESTION)):
            for name, value in self.arguments.items():
                if not self._has_effect(name, value):
                    raise ConfigError(
                        f"config key policy.template_args.{name} has value {value!r}, which changes nothing in the chat "
                        f"template of '{self._model}'; correct the name or remove it"
                    )
            return
        if self.arguments and self._try(_make_chat((USER, TRIAL_QUESTION)), arguments={}) is not None:
            raise ConfigError(
                f"config key policy.template_args has value {self.arguments!r}, with which the chat template of "
                f"'{self._model}' fails; correct or remove it"
            )
        try:
            found = self._apply(_make_chat((USER, TRIAL_QUESTION)), add_generation_prompt=True, **self.arguments)
            why = f"drops the text of a user's message (it rendered {str(found)[:80]!r})"
        except Exception as error:  # as in `_try`
            why = f"refuses a single user's message ({quote_error(error)})"
        raise ConfigError(f"{whose}, whose chat template {why}; use an instruction-tuned model, or fix its template")

    def _has_effect(self, name: str, value: Scalar) -> bool:
        """Tell whether an argument changes the text of any trial chat."""
        changed = not value if isinstance(value, bool) else f"{value}1" if isinstance(value, str) else value + 1
        without = {key: one for key, one in self.arguments.items() if key != name}
        others = (without, {**self.arguments, name: changed})
        return any(self._differ(self.arguments, other) for other in others)

    def _has_switch(self, switch: str) -> bool:
        on, off = ({**self.arguments, switch: value} for value in (True, False))
        return self._differ(on, off)

    def _differ(self, arguments: Mapping[str, Scalar], others: Mapping[str, Scalar]) -> bool:
        persona, asked, answered, next_asked = (
            (SYSTEM, TRIAL_PERSONA),
            (USER, TRIAL_QUESTION),
            (ASSISTANT, TRIAL_ANSWER),
            (USER, TRIAL_REMARK),
        )
        chats = [_make_chat(asked), _make_chat(persona, asked), _make_chat(asked, answered, next_asked)]
        return any(self._try(chat, arguments=arguments) != self._try(chat, arguments=others) for chat in chats)


class _Endless(BaseException):
    """A template took too long. It is no Exception, because an Exception counts as a refusal."""


@contextmanager
def _limit_computing(seconds: float) -> Iterator[None]:
    """Raise _Endless within the context after `seconds` of processor time. This works only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Endless

    usual = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, usual)


def _shape(messages: ChatMessages, rules: Rules, is_prompt: bool) -> list[dict[str, str]]:
    system = _join(said["content"] for said in messages if said["role"] == SYSTEM)
    chat = [
        {"role": ASSISTANT if said["role"] == ASSISTANT else USER, "content": said["content"]}
        for said in messages
        if said["role"] != SYSTEM
    ]
    if not _has_user(chat):
        is_kept = rules.may_have_system or not system  # otherwise the system text becomes the user's message
        if not (is_kept and (rules.may_lack_user if chat or system else rules.may_be_empty)):
            chat.insert(0, {"role": USER, "content": ""})
    while chat and chat[0]["role"] == ASSISTANT and not rules.may_begin_with_answer and _has_user(chat):
        chat.pop(0)
    if is_prompt and chat and chat[-1]["role"] == ASSISTANT and not rules.may_end_with_answer:
        chat.append({"role": USER, "content": ""})
    if system and not rules.may_have_system:
        first = next(said for said in chat if said["role"] == USER)
        first["content"] = _join((system, first["content"]))
    if not rules.may_repeat_role:
        chat = _merge(chat)
    for said in chat:
        if not rules.may_have_empty_text and not said["content"].strip():
            said["content"] = BLANK
    return [{"role": SYSTEM, "content": system}, *chat] if system and rules.may_have_system else chat


def make_trial_chat() -> list[dict[str, str]]:
    """Return the smallest chat: TRIAL_QUESTION and TRIAL_ANSWER."""
    return _make_chat((USER, TRIAL_QUESTION), (ASSISTANT, TRIAL_ANSWER))


def _make_chat(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def _has_user(chat: ChatMessages) -> bool:
    return any(said["role"] == USER for said in chat)


def _join(texts: Iterable[str]) -> str:
    """Join the texts that are not blank, with a blank line between them."""
    return "\n\n".join(text for text in texts if text.strip())


def _merge(chat: ChatMessages) -> list[dict[str, str]]:
    """Merge neighbouring messages of one role."""
    merged: list[dict[str, str]] = []
    for role, said in itertools.groupby(chat, key=lambda one: one["role"]):
        texts = [one["content"] for one in said]
        merged.append({"role": role, "content": texts[0] if len(texts) == 1 else _join(texts)})
    return merged
