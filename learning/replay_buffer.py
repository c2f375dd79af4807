"""ReplayBuffer: experiences derived from turns and feedback, for one training run.

Nothing is kept here: a snapshot is rebuilt from the facts each time, and says of every turn that it leaves out why. It
knows no objective and no model weights.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bot.config import Config
from bot.conversations import ConversationStore
from bot.dialogue import UNFINISHED
from bot.feedback import standing
from bot.tokenizer import ChatTokenizer
from bot.types import FeedbackKind, Message, Turn
from bot.users import Users
from learning.rewards import Reward, reward

IMPORTED = "import"  # the platform of conversations that were read from a file


@dataclass(frozen=True)
class Experience:
    """One answer with its reward, as exact token ids.

    `unit` is what the held-out part is drawn by. `logprobs` are those of the sampling, or None for a text that we did
    not sample (imported, or a person's correction).
    """

    turn_id: str
    unit: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    reward: float
    feedback_ids: tuple[str, ...]

    def digest(self) -> list[Any]:
        """What a manifest records of it."""
        ids = hashlib.sha256(json.dumps([self.prompt_ids, self.completion_ids]).encode()).hexdigest()[:16]
        return [self.turn_id, ids, round(self.reward, 6), list(self.feedback_ids)]


@dataclass
class Snapshot:
    """The experiences of one run, in a fixed order, and what was left out under which reason."""

    training: list[Experience] = field(default_factory=list)
    held_out: list[Experience] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    without_logprobs: int = 0
    turns: int = 0

    @property
    def feedback_ids(self) -> list[str]:
        """The feedback that the training part learns from."""
        return sorted({one for experience in self.training for one in experience.feedback_ids})


class Consent:
    """Who may be learned from, as it stands now. Imported conversations are the operator's to answer for."""

    def __init__(self, users: Users, platforms: dict[str, str], authors: dict[str, str]):
        self._platforms, self._authors = platforms, authors
        self._decided, self._assumed = users.decided(), users.assumed

    def of(self, turn: Turn, user_id: str) -> bool:
        """Whether a person in the conversation of `turn` consents."""
        platform = self._platforms[turn.conversation_id]
        return platform == IMPORTED or self._decided.get((platform, user_id), self._assumed)

    def to(self, turn: Turn) -> bool:
        """Whether everybody whose words the policy was shown for a turn consents."""
        shown = {self._authors[message] for message in turn.shown if message in self._authors}
        return all(self.of(turn, person) for person in shown | {turn.asker_id})


class ReplayBuffer:
    """Draws snapshots from what the ConversationStore holds."""

    def __init__(self, store: ConversationStore, tokenizer: ChatTokenizer, config: Config):
        self.store = store
        self.tokenizer = tokenizer
        self.config = config
        self.users = Users(store.database, config.privacy)

    def snapshot(self, space: str | None = None) -> Snapshot:
        """All that can be learned from now; only from one imported `space` if given."""
        turns = self.store.turns_with_feedback(space)
        given = self.store.feedback_of(turn.id for turn in turns)
        platforms = self.store.platforms({turn.conversation_id for turn in turns})
        authors = self.store.authors({message for turn in turns for message in turn.shown})
        consent = Consent(self.users, platforms, authors)
        found = Snapshot(turns=len(turns))
        kept: list[Experience] = []
        for turn in turns:
            imported = platforms[turn.conversation_id] == IMPORTED
            said = [row for row in given[turn.id] if consent.of(turn, row.user_id)]
            earned = reward(said, turn.asker_id, self.config.rewards)
            reason = self._why_not(turn, earned) if consent.to(turn) else "somebody in it does not consent"
            if reason is not None or earned is None:
                found.dropped[reason or ""] += 1
                continue
            # A live conversation never ends, so there the unit is the question; an imported one is held out whole.
            unit = turn.conversation_id if imported else turn.message_id
            wanted = [row for row in standing(said) if row.kind == FeedbackKind.CORRECTION and row.text]
            for experience in self._experiences(turn, unit, earned, wanted[-1].text if wanted else None):
                if len(experience.prompt_ids) + len(experience.completion_ids) > self.config.training.max_length:
                    found.dropped[f"longer than training.max_length ({self.config.training.max_length})"] += 1
                else:
                    kept.append(experience)
        surplus = max(0, len(kept) - self.config.learning.max_turns)
        if surplus:
            found.dropped[f"older than the newest {self.config.learning.max_turns} (learning.max_turns)"] = surplus
        for experience in kept[surplus:]:
            part = found.held_out if self._is_held_out(experience.unit) else found.training
            part.append(experience)
            found.without_logprobs += experience.logprobs is None
        return found

    def _why_not(self, turn: Turn, earned: Reward | None) -> str | None:
        if earned is None:
            return "no standing opinion"
        if earned.value == 0:
            return "opinions cancel out"
        if turn.finish_reason in UNFINISHED:
            return "the answer broke off"
        if not turn.text.strip():
            return "the answer is empty"
        return None

    def _experiences(self, turn: Turn, unit: str, earned: Reward, correction: str | None) -> list[Experience]:
        if turn.prompt_ids is None or turn.completion_ids is None:
            prompt = tuple(self.tokenizer.prompt_ids(self._asked(turn)))
            completion = tuple(self.tokenizer.completion_ids(self.tokenizer.neutralise(turn.text)))
        else:
            prompt, completion = turn.prompt_ids, turn.completion_ids
        made = [Experience(turn.id, unit, prompt, completion, turn.logprobs, earned.value, earned.feedback_ids)]
        if correction is not None:
            wanted = tuple(self.tokenizer.completion_ids(self.tokenizer.neutralise(correction)))
            made.append(Experience(turn.id, unit, prompt, wanted, None, 1.0, earned.feedback_ids))
        return made

    def _asked(self, turn: Turn) -> list[dict[str, str]]:
        """The chat messages that led to an imported turn: the chain of replies up to it."""
        said = {message.id: message for message in self.store.messages(turn.conversation_id)}
        chain: list[Message] = []
        at: str | None = turn.message_id
        while at is not None and at in said:
            chain.append(said[at])
            at = said[at].reply_to
        return [
            {"role": message.role.value, "content": self.tokenizer.neutralise(message.text)} for message in reversed(chain)
        ]

    def _is_held_out(self, unit: str) -> bool:
        drawn = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8]) / 2**64
        return drawn < self.config.learning.held_out
