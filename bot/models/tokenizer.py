"""ChatTokenizer: the policy's own tokenizer and chat template, for counting and for texts that we did not sample.

It knows no conversation and no budget, and leaves the template's rules to `bot.models.templates`. It loads a model
directory or a hub name through transformers, on first use, and needs no torch.
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

PLAIN_TOKENIZER = "TokenizersBackend"  # transformers' name for a tokenizer that is all in its tokenizer.json
ZERO_WIDTH_SPACE = "\u200b"


class ChatTokenizer:
    """Turns chat messages into the token ids that vLLM would make of them."""

    def __init__(self, model: str, template_args: Mapping[str, Scalar] | None = None):
        self.model = model
        self.template_args = dict(template_args or {})
        self.count_text_tokens = lru_cache(maxsize=4096)(self._count_text_tokens)

    @cached_property
    def hf(self) -> "PreTrainedTokenizerBase":
        """The transformers tokenizer behind this one."""
        try:
            tokenizer = _find_tokenizer_class(self.model).from_pretrained(self.model)
        except Exception as error:  # it is read without a check of what is in it
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
        """The chat template, tried out. Raises ConfigError where it cannot be used."""
        return Template(partial(self.hf.apply_chat_template, tokenize=False), self.template_args, self.model)

    def prompt_ids(self, messages: ChatMessages) -> list[int]:
        """Give the ids of `messages`, in the shape that the template wants, with the opening of the assistant's answer."""
        return self._encode(self.template.render(messages))

    def completion_ids(self, text: str) -> list[int]:
        """Give the ids of an answer as vLLM would have sampled them, with the token that ends the turn.

        They are what the template makes of the answer. If that does not continue the prompt (some templates write an answer
        otherwise than they open one), they are those of the text, after a closed thought if the prompt opens one.
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
        """Give the text of an answer as it is shown: without thoughts and without the token that ends it."""
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
        """How the model marks its thoughts; UNMARKED where neither its vocabulary nor its template has marks for them.

        The mark that a prompt ends with comes first, then those of the vocabulary; what the template has in plain text, the
        model writes in plain text too.
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
        """Whether the template sorts what a model says into channels, as gpt-oss does."""
        return CHANNEL_MARK in self.hf.get_chat_template()

    def with_thought_tokens(self, policy: PolicyConfig) -> PolicyConfig:
        """Give a model that may think first `policy.thought_tokens` beside `policy.max_tokens`; leave others as they are."""
        if not self._may_think:
            return policy
        return policy.model_copy(update={"max_tokens": policy.max_tokens + policy.thought_tokens})

    @property
    def _may_think(self) -> bool:
        """Whether an answer may begin with a thought: the prompt opens one, somebody asked for them, or the model has marks
        for them, and neither a switch nor the end of the prompt says that it should not.
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
        """The first special token that the template writes after an answer, which is not always the tokenizer's own end."""
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
        return self.hf.encode(text, add_special_tokens=False)  # the template writes the token that begins a text

    def count_prompt_tokens(self, messages: ChatMessages) -> int:
        """How many tokens the prompt made of `messages` has."""
        return len(self.prompt_ids(messages))

    def _count_text_tokens(self, text: str) -> int:
        """How many tokens `text` alone has."""
        return len(self._encode(text))

    def forget_texts(self) -> None:
        """Empty the caches of texts: that of their lengths, and that of words in the tokenizer behind this one."""
        self.count_text_tokens.cache_clear()
        if "hf" in self.__dict__:  # it was loaded
            backend = getattr(self.hf, "backend_tokenizer", None)
            getattr(getattr(backend, "model", None), "_clear_cache", lambda: None)()  # not every kind of model has one

    def clip(self, text: str, tokens: int) -> str:
        """The beginning of `text` that has at most about `tokens` tokens."""
        return self.hf.decode(self._encode(text)[: max(tokens, 0)]).rstrip("\ufffd")

    def neutralise(self, text: str) -> str:
        """Return `text` without the markers that a user could have typed to forge a turn or a thought."""
        for marker in self._markers:
            if marker in text:
                text = text.replace(marker, marker[0] + ZERO_WIDTH_SPACE + marker[1:])
        return text

    @cached_property
    def _markers(self) -> list[str]:
        """The special tokens, and those of the other added tokens that the template names or writes.

        The rest of the added tokens is text: Gemma's, for one, are line breaks, runs of spaces and HTML tags.
        """
        added = self.hf.added_tokens_decoder.values()
        asked, answered = make_trial_chat()
        chat = [{"role": "system", "content": TRIAL_PERSONA}, asked, answered, {"role": "user", "content": TRIAL_REMARK}]
        written = self.hf.get_chat_template() + self.template.render(chat)  # some put a marker together of its parts
        marks = {self.thoughts.opening, self.thoughts.closing}  # text or tokens
        special = {str(token) for token in added if token.special} | set(self.hf.all_special_tokens)
        named = {token for token in map(str, added) if token in written and token.strip() and not token.isalnum()}
        return sorted((token for token in special | named | marks if len(token) > 1), key=len, reverse=True)


def _find_tokenizer_class(model: str) -> Any:
    """Return the class that transformers loads a tokenizer with. A directory that names the plain one needs no choice, and
    so no torch, which the choice imports (400 MB).
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
