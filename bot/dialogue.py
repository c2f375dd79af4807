"""DialogueManager: hears a message, has it answered, keeps what was said and what people thought of it.

Here tracker, policy and store meet. It knows no platform and no training: connectors call it, learning reads what it
stored. A message and a reaction are committed before the caller is told that we have them (law 1).
"""

import asyncio
import hashlib
import secrets
from dataclasses import dataclass

from bot.conversations import ConversationStore
from bot.errors import DataError, ReplyInterrupted
from bot.policy import OnText, Policy
from bot.tracker import Context, StateTracker
from bot.types import Conversation, Feedback, FeedbackKind, Message, Reply, Turn, new_id

INTERRUPTED = "interrupted"  # a finish reason of ours: such a turn is never trained on


@dataclass(frozen=True)
class Explanation:
    """Why a turn is what it is."""

    turn: Turn
    feedback: list[Feedback]


class DialogueManager:
    """The bot's side of every conversation."""

    def __init__(self, store: ConversationStore, tracker: StateTracker, policy: Policy):
        self.store = store
        self.tracker = tracker
        self.policy = policy
        self._secret = secrets.token_bytes(32)

    async def open(self, conversation: Conversation) -> Conversation:
        """The stored conversation at this place."""
        return await self.store.database.call(self.store.open, conversation)

    async def respond(self, message: Message, on_text: OnText | None = None, seed: int | None = None) -> Turn:
        """Commit a message, have it answered, commit the answer. A message that came before gets its first answer."""
        call = self.store.database.call
        # Asked for together: under load each trip to the database's thread costs more in waiting than in work.
        fresh, context = await asyncio.gather(call(self.store.add_message, message), self.tracker.context(message))
        if not fresh:
            message = await call(self.store.message_of_event, message.event_id)
            answered = await call(self.store.turn_answering, message.id)
            if answered is not None:
                return answered
            context = await self.tracker.context(message)
        return await self._answer(message, context, message.author_id, None, on_text, seed)

    async def regenerate(self, turn_id: str, user_id: str, on_text: OnText | None = None, seed: int | None = None) -> Turn:
        """Another answer to the same message; that the first was not wanted is recorded as feedback on it."""
        turn = await self._turn(turn_id)
        await self.record_feedback(Feedback(turn.id, user_id, FeedbackKind.REGENERATE, signal="regenerate"))
        message = await self.store.database.call(self.store.message, turn.message_id)
        context = await self.tracker.context(message)
        return await self._answer(message, context, turn.asker_id, turn.id, on_text, seed)

    async def record_feedback(self, given: Feedback) -> bool:
        """Commit one act of feedback; False where its event was recorded before."""
        await self._turn(given.turn_id)
        return await self.store.database.call(self.store.add_feedback, given)

    async def explain(self, turn_id: str) -> Explanation:
        """A turn with all that was said about it."""
        turn = await self._turn(turn_id)
        said = await self.store.database.call(self.store.feedback_of, [turn_id])
        return Explanation(turn, said.get(turn_id, []))

    async def _answer(
        self,
        message: Message,
        context: Context,
        asker_id: str,
        replaces: str | None,
        on_text: OnText | None,
        seed: int | None,
    ) -> Turn:
        reply = await self._reply(message.conversation_id, context, on_text, seed)
        turn = Turn(
            conversation_id=message.conversation_id,
            message_id=message.id,
            reply_id=new_id(),
            text=reply.text,
            asker_id=asker_id,
            policy_version=reply.policy_version,
            prompt_ids=reply.prompt_ids,
            completion_ids=reply.completion_ids,
            logprobs=reply.logprobs,
            finish_reason=reply.finish_reason,
            sampling=reply.sampling,
            latency_ms=reply.latency_ms,
            replaces=replaces,
        )
        await self.store.database.call(self.store.add_turn, turn)
        return turn

    async def _reply(self, conversation_id: str, context: Context, on_text: OnText | None, seed: int | None) -> Reply:
        version = self.policy.version
        # Nobody can learn from the prefix cache's timing what was said in another conversation (CVE-2025-46570).
        salt = hashlib.blake2b(conversation_id.encode(), key=self._secret).hexdigest()
        try:
            return await self.policy.reply(context.prompt_ids, version=version, seed=seed, cache_salt=salt, on_text=on_text)
        except ReplyInterrupted as broken:
            return Reply(broken.text, version, (), (), (), INTERRUPTED, {}, 0.0)

    async def _turn(self, turn_id: str) -> Turn:
        turn = await self.store.database.call(self.store.turn, turn_id)
        if turn is None:
            raise DataError(f"there is no turn '{turn_id}'")
        return turn
