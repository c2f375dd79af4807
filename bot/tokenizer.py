"""ChatTokenizer: the policy's own tokenizer and chat template, for counting and for texts that we did not sample.

It knows no conversation and no budget. It loads a model directory or a hub name through transformers, on first use,
and needs no torch.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from bot.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatMessages = Sequence[dict[str, str]]

ZERO_WIDTH_SPACE = "\u200b"


class ChatTokenizer:
    """Turns chat messages into the token ids that vLLM would make of them."""

    def __init__(self, model: str):
        self.model = model
        self.length = lru_cache(maxsize=4096)(self._length)

    @cached_property
    def hf(self) -> "PreTrainedTokenizerBase":
        """The transformers tokenizer behind this one."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"config key policy.model has value '{self.model}', whose tokenizer cannot be loaded "
                f"({str(error).splitlines()[0]}); name a complete model directory or hub model"
            ) from error
        if not tokenizer.chat_template:
            raise ConfigError(
                f"config key policy.model has value '{self.model}', whose tokenizer has no chat template; "
                "use an instruction-tuned model"
            )
        return tokenizer

    def prompt_ids(self, messages: ChatMessages) -> list[int]:
        """The ids of `messages` with the opening of the assistant's answer."""
        return self.hf.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)

    def completion_ids(self, text: str) -> list[int]:
        """The ids of an answer as vLLM would have sampled them, with the end-of-turn token."""
        return [*self.hf.encode(text, add_special_tokens=False), self.hf.eos_token_id]

    def count(self, messages: ChatMessages) -> int:
        """How many tokens the prompt made of `messages` has."""
        return len(self.prompt_ids(messages))

    def _length(self, text: str) -> int:
        """How many tokens `text` alone has."""
        return len(self.hf.encode(text, add_special_tokens=False))

    def clip(self, text: str, tokens: int) -> str:
        """The beginning of `text` that has at most about `tokens` tokens."""
        return self.hf.decode(self.hf.encode(text, add_special_tokens=False)[: max(tokens, 0)]).rstrip("\ufffd")

    def neutralise(self, text: str) -> str:
        """`text` in which no special token is left that a user could have typed to forge a turn."""
        for token in self._special:
            if token in text:
                text = text.replace(token, token[0] + ZERO_WIDTH_SPACE + token[1:])
        return text

    @cached_property
    def _special(self) -> list[str]:
        added = {str(token) for token in self.hf.added_tokens_decoder.values()}
        return sorted(added | set(self.hf.all_special_tokens), key=len, reverse=True)
