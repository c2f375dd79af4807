"""ChatTokenizer: the policy's own tokenizer and chat template, to count tokens and to encode texts that were not sampled.

It loads them with transformers on first use, from a model directory or the hub, and needs no torch. `bot.models.templates`
has the template's rules.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bot.config import PolicyConfig
from bot.errors import ConfigError, quote_error
from bot.models.templates import TRIAL_ANSWER, TRIAL_PERSONA, TRIAL_REMARK, Scalar, Template, make_trial_chat
from bot.models.thoughts import CHANNEL_MARK, MARKS, UNMARKED, Thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatMessages = Sequence[dict[str, str]]

PLAIN_TOKENIZER = "TokenizersBackend"  # transformers' name for a tokenizer that needs only its tokenizer.json
ZERO_WIDTH_SPACE = "\u200b"


class ChatTokenizer:
    """Encodes chat messages as vLLM does."""

    def __init__(self, model: str, template_args: Mapping[str, Scalar] | None = None):
        self.model = model
        self.template_args = dict(template_args or {})
        self.count_text_tokens = lru_cache(maxsize=4096)(self._count_text_tokens)

    @cached_property
    def hf(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of transformers. Raises ConfigError if it cannot be loaded or has no chat template."""
        try:
            tokenizer = _find_tokenizer_class(self.model).from_pretrained(self.model)
        except Exception as error:  # transformers does not validate the files: it may raise anything
            raise ConfigError(
                f"config key policy.model has value '{self.model}', whose tokenizer cannot be loaded "
                f"({quote_error(error)}); name a complete model directory or hub model"
            ) from error
        if not tokenizer.chat_template:
            raise ConfigError(
                f"config key policy.model has value '{self.model}', whose tokenizer has no chat template; "
                "use an instruction-tuned model"
            )
        return tokenizer

    @cached_property
    def template(self) -> Template:
        """The chat template. Raises ConfigError if it cannot be used."""
        return Template(partial(self.hf.apply_chat_template, tokenize=False), self.template_args, self.model)

    def prompt_ids(self, messages: ChatMessages) -> list[int]:
        """Return the ids of `messages` in the template's shape, with the opening of the assistant's answer."""
        return self._encode(self.template.render(messages))

    def completion_ids(self, text: str) -> list[int]:
        """Return the ids of an answer as vLLM would have sampled them, with the token that ends the turn.

        The template renders the answer. If the result does not continue the prompt, as some templates open an answer
        differently, only the text is encoded, after an empty thought if the prompt opens one.
        """
        question, _ = make_trial_chat()
        prompt = self.prompt_ids([question])
        answered = [question, {"role": "assistant", "content": text}]
        whole = self._encode(self.template.render(answered, is_prompt=False)) if text.strip() else []
        said = whole[len(prompt) :]
        if whole[: len(prompt)] == prompt and self._turn_end in said:
            return said[: len(said) - said[::-1].index(self._turn_end)]
        before = f"\n{self.thoughts.closing}\n\n" if self.thoughts.is_opened_by_prompt else ""
        return [*self._encode(before + text), self._turn_end]

    def decode_answer(self, completion_ids: Sequence[int]) -> str:
        """Return the text of an answer to show, without its thoughts and end tokens."""
        said = [one for one in completion_ids if one not in self.end_ids]
        hides_special = not self.thoughts.is_special
        text = self.hf.decode(said, skip_special_tokens=hides_special, clean_up_tokenization_spaces=False)
        return self.thoughts.remove_from(text)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The ids that end an answer: the template's end of a turn, and the end of the text."""
        return frozenset({self._turn_end} | ({self.hf.eos_token_id} - {None}))

    @cached_property
    def thoughts(self) -> Thoughts:
        """The model's marks for thoughts; UNMARKED if neither its vocabulary nor its template has any.

        A mark that a prompt leaves open comes first, then marks in the vocabulary, then plain text in the template, which
        the model writes as plain text too.
        """
        added = {str(token): token.special for token in self.hf.added_tokens_decoder.values()}
        template, prompt = self.hf.get_chat_template(), self.template.render(make_trial_chat()[:1])
        tokens = [pair for pair in MARKS if all(mark in added for mark in pair)]
        written = [pair for pair in MARKS if any(mark in template for mark in pair)]
        opened = [pair for pair in MARKS if prompt.rfind(pair[0]) > prompt.rfind(pair[1])]
        pair = next(iter((*opened, *tokens, *written)), None)
        if pair is None:
            return UNMARKED
        return Thoughts(*pair, is_opened_by_prompt=pair in opened, is_special=any(added.get(mark, False) for mark in pair))

    @property
    def has_channels(self) -> bool:
        """Whether the template puts thoughts and answers into channels, as that of gpt-oss does."""
        return CHANNEL_MARK in self.hf.get_chat_template()

    def with_thought_tokens(self, policy: PolicyConfig) -> PolicyConfig:
        """Add `policy.thought_tokens` to `policy.max_tokens` if the model may think first."""
        if not self._may_think:
            return policy
        return policy.model_copy(update={"max_tokens": policy.max_tokens + policy.thought_tokens})

    @property
    def _may_think(self) -> bool:
        """Whether an answer may begin with a thought: the prompt opens one, or a switch is on, or the model has marks and
        neither a switch nor the end of the prompt turns thoughts off.
        """
        if self.thoughts.is_opened_by_prompt:
            return True
        if self.template.is_thinking is not None:
            return self.template.is_thinking
        question = make_trial_chat()[:1]
        is_closed = self.thoughts.closing in self.template.render(question).rpartition(question[0]["content"])[2]
        return self.thoughts != UNMARKED and not is_closed

    @cached_property
    def _turn_end(self) -> int:
        """The first special token that the template writes after an answer. It may differ from the tokenizer's end token."""
        for chat in ([*make_trial_chat(), {"role": "user", "content": TRIAL_REMARK}], make_trial_chat()):
            after = self.template.render(chat, is_prompt=False).partition(TRIAL_ANSWER)[2].lstrip()
            first = self._encode(after)[:1]
            if first and first[0] in self.hf.added_tokens_decoder:
                return first[0]
        if self.hf.eos_token_id is None:
            raise ConfigError(
                f"config key policy.model has value '{self.model}', whose chat template and tokenizer name no token "
                "that ends an answer; use an instruction-tuned model"
            )
        return self.hf.eos_token_id

    def _encode(self, text: str) -> list[int]:
        return self.hf.encode(text, add_special_tokens=False)  # the template writes the start token

    def count_prompt_tokens(self, messages: ChatMessages) -> int:
        """Count the tokens of the prompt for `messages`."""
        return len(self.prompt_ids(messages))

    def _count_text_tokens(self, text: str) -> int:
        """Count the tokens of `text` alone."""
        return len(self._encode(text))

    def forget_texts(self) -> None:
        """Empty the caches of texts: that of token counts, and that of words inside the tokenizer."""
        self.count_text_tokens.cache_clear()
        if "hf" in self.__dict__:  # it is loaded
            backend = getattr(self.hf, "backend_tokenizer", None)
            getattr(getattr(backend, "model", None), "_clear_cache", lambda: None)()  # not every kind of model has one

    def clip(self, text: str, tokens: int) -> str:
        """Return the beginning of `text`, about `tokens` tokens long at most."""
        return self.hf.decode(self._encode(text)[: max(tokens, 0)]).rstrip("\ufffd")

    def neutralise(self, text: str) -> str:
        """Return `text` with a zero-width space in each marker, so that a user cannot forge a turn or a thought."""
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker[0] + ZERO_WIDTH_SPACE + marker[1:])
        return text

    @cached_property
    def _markers(self) -> list[str]:
        """The special tokens, the marks of thoughts, and those added tokens that the template contains or writes.

        Other added tokens are ordinary text: Gemma's, for example, are line breaks, runs of spaces and HTML tags.
        """
        added = self.hf.added_tokens_decoder.values()
        asked, answered = make_trial_chat()
        chat = [{"role": "system", "content": TRIAL_PERSONA}, asked, answered, {"role": "user", "content": TRIAL_REMARK}]
        written = self.hf.get_chat_template() + self.template.render(chat)  # some templates join a marker from parts
        marks = {self.thoughts.opening, self.thoughts.closing}  # text or tokens
        special = {str(token) for token in added if token.special} | set(self.hf.all_special_tokens)
        named = {token for token in map(str, added) if token in written and token.strip() and not token.isalnum()}
        return sorted((token for token in special | named | marks if len(token) > 1), key=len, reverse=True)


def _find_tokenizer_class(model: str) -> Any:
    """Return transformers' class for a model's tokenizer. AutoTokenizer imports torch (400 MB), so it is avoided for a
    directory that names the plain class.
    """
    file = Path(model) / "tokenizer_config.json"
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if named == PLAIN_TOKENIZER:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
