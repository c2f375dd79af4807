"""Voices: decide which feedback on some turns counts, with the reasons for the rest (law 7).

Feedback counts if the person consents and has written in the channel of the answer.
"""

from collections.abc import Sequence

from bot.config import RewardsConfig, WebConfig
from bot.store.conversations import ConversationStore
from bot.store.feedback import not_retracted, select_effective
from bot.store.participants import find_participants
from bot.store.users import Users, resolve_voice
from bot.types import Feedback, FeedbackKind, FollowUp, Message, Turn
from learning.data.rewards import FEEDBACK_OF_FOLLOW_UP
from learning.data.selection import question_key

IMPORT_PLATFORM = "import"  # platform of imported conversations


class Consent:
    """People's current consent to learning. The operator is responsible for imported conversations, which always count."""

    def __init__(self, users: Users, platforms: dict[str, str], behind: dict[str, set[str]]):
        self._platforms, self._behind = platforms, behind
        self._decided, self._assumed = users.read_decisions(), users.is_consent_assumed

    def is_given_by(self, said: Turn | Message, user_id: str) -> bool:
        """Whether a person in the conversation of `said` consents."""
        platform = self._platforms[said.conversation_id]
        return platform == IMPORT_PLATFORM or self._decided.get((platform, user_id), self._assumed)

    def may_teach(self, turn: Turn) -> bool:
        """Whether all people consent whose words a turn was made from, directly or through other answers."""
        return all(self.is_given_by(turn, person) for person in self._behind.get(turn.id, set()) | {turn.asker_id})


class Voices:
    """All feedback on some turns, read once."""

    def __init__(self, store: ConversationStore, users: Users, turns: Sequence[Turn], web: WebConfig):
        self._web = web
        self._given = store.read_feedback_on(turn.id for turn in turns)
        given = [row for rows in self._given.values() for row in rows]
        self._not_retracted = {row.id for row in not_retracted(given)}
        self._standing = {row.id for row in select_effective(given)}
        self._platforms = store.find_platforms({turn.conversation_id for turn in turns})
        live = [turn for turn in turns if not self.is_imported(turn)]
        asked = [(turn.conversation_id, row.user_id) for turn in live for row in self._given[turn.id]]
        self._participants = find_participants(store.database, asked)
        self.consent = Consent(users, self._platforms, store.find_authors_behind(turn.id for turn in turns))
        self.questions = store.read_texts({turn.message_id for turn in turns})
        self._said_next = store.find_first_followups(turn.id for turn in turns)

    def is_imported(self, turn: Turn) -> bool:
        """Whether a turn was imported from a file."""
        return self._platforms[turn.conversation_id] == IMPORT_PLATFORM

    def resolve_person(self, turn: Turn, user_id: str) -> str:
        """Return the name that a person in the conversation of `turn` counts under."""
        return resolve_voice(self._platforms[turn.conversation_id], user_id, self._web)

    def find_unit(self, turn: Turn) -> str:
        """Return the unit of a turn: its imported conversation, or else the words of its question, whoever asks it.

        A live conversation is no unit, because it never ends.
        """
        if self.is_imported(turn):
            return turn.conversation_id
        return question_key(self.questions[turn.message_id]) or turn.message_id

    def judge_feedback(self, turn: Turn) -> list[tuple[Feedback, str | None]]:
        """Return all acts of feedback on a turn, each with the reason why it does not count, or None (law 7)."""
        return [(row, self._explain_not_counted(turn, row)) for row in self._given[turn.id]]

    def _explain_not_counted(self, turn: Turn, row: Feedback) -> str | None:
        is_there = row.user_id == turn.asker_id or (turn.conversation_id, row.user_id) in self._participants
        if not self.consent.is_given_by(turn, row.user_id):
            return "the person does not consent to learning"
        if not self.is_imported(turn) and not is_there:
            return "the person never wrote in this channel"
        if row.retracts:
            return "it is a retraction"
        if row.id not in self._not_retracted:
            return "it was retracted or repeated later"
        if row.id not in self._standing:
            return "the person changed their opinion later"
        return None

    def judge_followup(self, turn: Turn, config: RewardsConfig) -> tuple[FollowUp | None, str | None]:
        """Return the follow-up on a turn, if any, and the reason why it does not count, or None."""
        followup, message = self._said_next.get(turn.id, (None, None))
        if followup is None or message is None:
            return None, None
        if message.author_id != turn.asker_id:
            return followup, "it is not from the asker"
        if not self.consent.is_given_by(turn, turn.asker_id):
            return followup, "the person does not consent to learning"
        if not config.followup:
            return followup, "rewards.followup is off"
        return followup, None if followup.kind in FEEDBACK_OF_FOLLOW_UP else "it says nothing about the answer"

    def find_ranks(self, turn: Turn) -> list[Feedback]:
        """Return the ranks of a turn among its siblings that count."""
        counted = [row for row, reason in self.judge_feedback(turn) if reason is None]
        return [row for row in counted if row.kind == FeedbackKind.RANK and row.value is not None]

    def compute_rank(self, turn: Turn) -> float:
        """Return the negative mean rank of a turn among its siblings, so higher is better; 0 without ranks."""
        ranks = [row.value or 0.0 for row in self.find_ranks(turn)]
        return -sum(ranks) / len(ranks) if ranks else 0.0
