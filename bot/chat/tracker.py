"""StateTracker: makes a prompt of a conversation and a new message, within a token budget.

The policy's own tokenizer and chat template count the tokens. The newest message is never dropped; recent messages come
next; `bot.memory.recall` finds older ones, and those elsewhere in the scope.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from bot.chat.speakers import with_speakers
from bot.config import DEFAULT_PERSONA, DialogueConfig
from bot.errors import ConfigError
from bot.memory.facts import resolve_facts
from bot.memory.index import ScopeIndex
from bot.memory.recall import Recall, RecalledMessage, ScopeContents
from bot.models.tokenizer import ChatTokenizer
from bot.store.conversations import ConversationStore
from bot.types import Conversation, Message, Role

CUT_MARK = " […]"
MARGIN = 16  # tokens: a text in a chat is not always tokenized as it is alone
CHARACTERS_PER_TOKEN = 32  # more than the average of any tokenizer


@dataclass(frozen=True)
class Context:
    """A prompt, as chat messages and token ids, and the stored messages in it."""

    messages: list[dict[str, str]]
    prompt_ids: list[int]
    recent: list[Message]
    remembered: list[RecalledMessage]

    @property
    def shown(self) -> dict[str, float | None]:
        """The ids of the earlier messages in the prompt, each with its score if it was recalled, as a Turn records them."""
        shown: dict[str, float | None] = dict.fromkeys((said.id for said in self.recent), None)
        shown.update((found.message.id, found.score) for found in self.remembered)
        return shown


@dataclass(frozen=True)
class Surroundings:
    """The surroundings of a new message in the database: the messages before it, and the contents of its scope."""

    recent: list[Message]
    scope: ScopeContents


class StateTracker:
    """Chooses the messages that the policy sees. Raises ConfigError if persona and template take half of the budget."""

    def __init__(
        self,
        store: ConversationStore,
        tokenizer: ChatTokenizer,
        recall: Recall,
        config: DialogueConfig,
        budget: int,
    ):
        self.store = store
        self.tokenizer = tokenizer
        self.recall = recall
        self.config = config
        self.budget = budget
        self._prompt_overhead = (
            tokenizer.count_prompt_tokens(self._make_chat([], "", "")) + MARGIN
        )  # tokens around a new message
        pair = [Message("", "", "", Role.USER), Message("", "", "", Role.ASSISTANT)]
        self._message_overhead = (
            tokenizer.count_prompt_tokens(self._make_chat(pair, "", "")) + MARGIN - self._prompt_overhead
        ) // 2  # tokens around an older one
        if tokenizer.count_prompt_tokens([{"role": "system", "content": config.persona}]) > budget // 2:
            way = "raise it" if config.persona in ("", DEFAULT_PERSONA) else "shorten dialogue.persona, or raise it"
            raise ConfigError(
                f"config key policy.context_tokens has value {budget}, and persona and chat template take more than half; "
                f"{way}"
            )

    def read_surroundings(self, message: Message, place: Conversation | None = None) -> Surroundings:
        """Read the surroundings of a message in its conversation, which is read too if `place` is None.

        Call it in the database's thread.
        """
        recent = self.store.read_recent_messages(message.conversation_id, message, self.config.recent)
        if not self.config.remembered:
            return Surroundings(recent, ScopeContents(ScopeIndex(), [], []))
        place = place or self.store.read_conversation(message.conversation_id)
        return Surroundings(recent, self.recall.read_scope(place, message.text))

    async def build_context(self, message: Message, around: Surroundings | None = None) -> Context:
        """Return the prompt for `message`, never over the budget. Its surroundings are read if `around` is None."""
        if around is None:
            around = await self.store.database.call(self.read_surroundings, message)
        *recent, named = with_speakers([*around.recent, message])
        newest, place = self._clip_message(named), message.conversation_id
        index = await self.recall.update_index(around.scope)
        shown = {said.id for said in recent[self._find_window_start(recent, newest, notes="") :]}
        remembered: list[RecalledMessage] = []
        if around.scope.older or index.has_content_besides(place, {message.id, *shown}):
            found = await self.recall.find(message, self.config.remembered, shown, around.scope)
            near = [one for one in found if _is_worth_showing(one, message)]
            remembered = self._drop_unaffordable(_drop_outdated(near), newest)
        window, sent, prompt_ids = self._fit_newest(recent, newest, self._write_notes(remembered))
        return Context(sent, prompt_ids, window, remembered)

    def fit_messages(self, shown: Sequence[dict[str, str]], begun: str = "") -> Context:
        """Return the prompt for chat messages whose history a client keeps, the new one last, never over the budget.

        `Context.recent` has the part of the history that fits. The prompt ends with the answer that was `begun`, unless the
        model thinks first: it would have to think again.
        """
        *before, newest = [Message("", "", said["content"], Role(said["role"])) for said in shown]
        opening = self._encode_partial_answer(begun)
        system = "\n".join(said.text for said in before if said.role == Role.SYSTEM)
        notes = self.tokenizer.neutralise(system[: self.budget * CHARACTERS_PER_TOKEN])
        notes = self.tokenizer.clip(notes, self.budget // 4)
        window = [said for said in before if said.role != Role.SYSTEM]
        clipped = self._clip_message(newest, notes, len(opening))
        window, sent, prompt_ids = self._fit_newest(window, clipped, notes, len(opening))
        continued = [Message("", "", begun, Role.ASSISTANT)] if opening else []
        return Context(sent, [*prompt_ids, *opening], [*window, *continued], [])

    def _encode_partial_answer(self, begun: str) -> list[int]:
        """Return the token ids of a partial answer, without an end token; only its end if it is long."""
        if not begun.strip() or self.tokenizer.thoughts.is_opened_by_prompt:
            return []
        text = self.tokenizer.neutralise(begun[-self.budget * CHARACTERS_PER_TOKEN :])
        return self.tokenizer.completion_ids(text)[:-1][-self.budget // 4 :]

    def _fit_newest(
        self, recent: list[Message], newest: str, notes: str, spare: int = 0
    ) -> tuple[list[Message], list[dict[str, str]], list[int]]:
        """Fit as many of the newest messages as possible beside the new one and the notes, with `spare` tokens left.

        Returns these messages, the chat with them, and its token ids.
        """
        window = self._drop_leading_answers(recent[self._find_window_start(recent, newest, notes) :])
        sent = self._make_chat(window, newest, notes)
        while len(prompt_ids := self.tokenizer.prompt_ids(sent)) > self.budget - spare and window:
            window = self._drop_leading_answers(window[1:])  # the template adds tokens around each message
            sent = self._make_chat(window, newest, notes)
        return window, self.tokenizer.template.shape(sent), prompt_ids

    def _drop_leading_answers(self, window: list[Message]) -> list[Message]:
        """Remove answers from the beginning if the template wants a user's message first: it would drop them."""
        if self.tokenizer.template.rules.may_begin_with_answer:
            return window
        return list(itertools.dropwhile(lambda said: said.role == Role.ASSISTANT, window))

    def _find_window_start(self, recent: list[Message], newest: str, notes: str) -> int:
        """Estimate from the lengths of single texts how many of the newest messages fit; return the index of the first."""
        start, left = (
            len(recent),
            self.budget - self._prompt_overhead + MARGIN - sum(map(self.tokenizer.count_text_tokens, (notes, newest))),
        )
        while (
            start
            and (
                left := left
                - self._message_overhead
                - self.tokenizer.count_text_tokens(self._make_harmless(recent[start - 1]))
            )
            >= 0
        ):
            start -= 1
        return start

    def _drop_unaffordable(self, found: list[RecalledMessage], newest: str) -> list[RecalledMessage]:
        """Keep the best recalled messages that fit in half of the tokens that the new message leaves."""
        alone = self.tokenizer.count_prompt_tokens(self._make_chat([], newest, ""))
        limit = alone + (self.budget - alone) // 2
        while found and self.tokenizer.count_prompt_tokens(self._make_chat([], newest, self._write_notes(found))) > limit:
            found = found[:-1]
        return found

    def _write_notes(self, remembered: list[RecalledMessage]) -> str:
        in_order = sorted((found.message for found in remembered), key=lambda said: (said.at, said.id))
        lines = (
            f"{self.tokenizer.neutralise(said.author_name or said.author_id)}, {said.at:%Y-%m-%d}: "
            f"{self._make_harmless(said)}"
            for said in in_order
        )
        return "\n".join(("Said earlier:", *lines)) if remembered else ""

    def _make_chat(self, window: list[Message], newest: str, notes: str) -> list[dict[str, str]]:
        system = "\n".join(part for part in (self.config.persona, notes) if part)
        sent = [{"role": "system", "content": system}] if system else []
        sent += [{"role": said.role.value, "content": self._make_harmless(said)} for said in window]
        return [*sent, {"role": Role.USER.value, "content": newest}]

    def _make_harmless(self, message: Message) -> str:
        """Return a message's text without template markers, cut to a bounded length before its tokens are counted."""
        return self.tokenizer.neutralise(message.text[: self.budget * CHARACTERS_PER_TOKEN])

    def _clip_message(self, message: Message, notes: str = "", spare: int = 0) -> str:
        """Return the new message; only its beginning and a mark if it does not fit beside the notes and `spare` tokens."""
        text = clipped = self._make_harmless(message)
        keep = self.tokenizer.count_text_tokens(text)
        if self._prompt_overhead + keep + self.tokenizer.count_text_tokens(notes) <= self.budget - spare:
            return text
        while (
            over := self.tokenizer.count_prompt_tokens(self._make_chat([], clipped, notes)) - self.budget + spare
        ) > 0 and keep > 0:
            keep -= over
            clipped = self.tokenizer.clip(text, keep) + CUT_MARK
        return clipped


def _drop_outdated(found: list[RecalledMessage]) -> list[RecalledMessage]:
    """Remove messages whose statements about a person are outdated by a newer message among those found."""
    holding, former = resolve_facts(one.message for one in found)
    gone = {fact.message.id for fact in former} - {fact.message.id for fact in holding}
    return [one for one in found if one.message.id not in gone]


def _is_worth_showing(found: RecalledMessage, message: Message) -> bool:
    """Tell whether a message is near, has other words than the new one, and is no answer from another conversation."""
    said = found.message
    own = said.role == Role.ASSISTANT and said.conversation_id != message.conversation_id
    return found.is_near and not own and said.text.strip().casefold() != message.text.strip().casefold()
