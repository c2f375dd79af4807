"""DialogueManager: stores messages, has them answered, and stores answers and feedback.

It joins tracker, policy and store. Connectors call it; learning reads what it stored. Its methods return only after a
message or a reaction is committed (law 1).
"""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from bot.chat.selecting import AnswerSampler
from bot.chat.speakers import clean_name
from bot.chat.tracker import Context, StateTracker, Surroundings
from bot.config import ServingConfig
from bot.errors import DataError, ForgottenError, ReplyInterrupted
from bot.logs import log_text, working_on
from bot.memory.followups import FollowUps
from bot.serving.policy import STOPPED, OnText, Policy
from bot.serving.selection import Selector
from bot.store.conversations import ConversationStore
from bot.store.forgetting import forget_message
from bot.store.histories import add_fingerprint, find_repeated_messages
from bot.store.picks import PICK, find_pick, record_pick, retract_pick
from bot.types import (
    FORGOTTEN,
    Conversation,
    Feedback,
    FeedbackKind,
    Message,
    Pick,
    Reply,
    Role,
    SamplingParams,
    Selection,
    StoredMessage,
    Turn,
    new_id,
    now,
)

log = logging.getLogger(__name__)

OnTurn = Callable[[Turn], Awaitable[None]]
# A stored message; its answer, if it has one; otherwise its surroundings.
StoredQuestion = tuple[Message, Turn | None, Surroundings | None]

MAX_MESSAGE_CHARACTERS = 100_000  # of one message, far more than the policy's token budget
INTERRUPTED = "interrupted"  # our own finish reason
NO_ANSWER = "Sorry, I found no answer to that. Please ask me again."
UNFINISHED_REASONS = {INTERRUPTED, STOPPED}  # never train on such a turn: it teaches the policy to stop in the middle


@dataclass(frozen=True)
class ReplyOptions:
    """Options for one answer: callbacks, an event that stops it, the id of its turn, the sampling seed, the largest number
    of tokens, the texts that it ends before, and from how many candidates it may be chosen.

    `on_turn` receives the final turn while it is being committed. Database calls that follow from it come after the commit.
    """

    on_text: OnText | None = None
    on_turn: OnTurn | None = None
    stop: asyncio.Event | None = None
    turn_id: str | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    has_client_history: bool = False  # the client keeps the history, and may send question and answer again
    candidates: int | None = None  # None: as many as the DialogueManager samples


DEFAULT_OPTIONS = ReplyOptions()


@dataclass(frozen=True)
class History:
    """The history that a client sends with a question: the chat messages `before` it, and a `partial_answer` to continue."""

    before: Sequence[dict[str, str]] = ()
    partial_answer: str = ""


@dataclass(frozen=True)
class Explanation:
    """A turn and the feedback on it."""

    turn: Turn
    feedback: list[Feedback]


def clean_text(text: str) -> str:
    """Return `text` without lone surrogates and NULs, which not every database stores, cut at MAX_MESSAGE_CHARACTERS."""
    return text[:MAX_MESSAGE_CHARACTERS].encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _clean_message(message: Message) -> Message:
    return replace(message, text=clean_text(message.text), author_name=clean_name(clean_text(message.author_name)))


def _log_stored(message: Message) -> None:
    log.debug("stored message %s of event %s in conversation %s", message.id, message.event_id, message.conversation_id)
    if message.text:
        log_text("message", message.text)


def render_answer(turn: Turn) -> str:
    """Return the text of an answer for a person, or an apology if the answer is blank."""
    return turn.text if turn.text.strip() or turn.finish_reason == STOPPED else NO_ANSWER


class DialogueManager:
    """The bot's side of every conversation. A `selector` chooses each answer from at most `candidates`."""

    def __init__(
        self,
        store: ConversationStore,
        tracker: StateTracker,
        policy: Policy,
        selector: Selector | None = None,
        candidates: int = ServingConfig().candidates,
    ):
        self.store = store
        self.tracker = tracker
        self.policy = policy
        self.sampler = AnswerSampler(policy, selector, candidates)
        self.followups = FollowUps(tracker.recall)
        self._follow_up_tasks: set[asyncio.Task[None]] = set()
        self._secret = secrets.token_bytes(32)

    async def open(self, conversation: Conversation) -> Conversation:
        """Return the stored conversation at this place. Create it if it is new."""
        return await self.store.database.call(self.store.open_conversation, conversation)

    async def respond(
        self,
        message: Message,
        options: ReplyOptions = DEFAULT_OPTIONS,
        place: Conversation | None = None,
    ) -> Turn:
        """Commit a message, answer it, and commit the answer. Return the first answer of a message that is known already.

        `place` is needed if the caller does not know the message's conversation.
        """
        message = _clean_message(message)
        # One call only: under load, waiting for the database's thread costs more than the work.
        taken_in = await self.store.database.call(self._store_and_read, message, place, options)
        _log_stored(taken_in[0])
        return await self._find_or_answer(taken_in, options)

    async def respond_to_history(
        self, message: Message, history: History, place: Conversation, options: ReplyOptions = DEFAULT_OPTIONS
    ) -> Turn:
        """Commit a message, answer it with the `history` that a client sent, and commit the answer."""
        message = replace(message, text=clean_text(message.text))
        before = [{**said, "content": clean_text(said["content"])} for said in history.before]
        asked = {"role": Role.USER.value, "content": message.text}
        context = self.tracker.fit_messages([*before, asked], clean_text(history.partial_answer))
        message, known = await self.store.database.call(self._store_with_history, message, place, context.recent)
        _log_stored(message)
        return await self._answer(message, replace(context, recent=known), message.author_id, None, options)

    async def answer(self, heard: StoredMessage, options: ReplyOptions = DEFAULT_OPTIONS) -> Turn:
        """Answer a message that `hear` stored, and commit the answer. Return the first answer if there is one already."""
        return await self._find_or_answer(await self.store.database.call(self._read_again, heard), options)

    async def _find_or_answer(self, taken_in: StoredQuestion, options: ReplyOptions) -> Turn:
        first, answered, around = taken_in
        if answered is not None:
            return answered
        if first.is_forgotten:
            raise ForgottenError("this message was forgotten: it gets no answer")
        return await self._answer(first, await self.tracker.build_context(first, around), first.author_id, None, options)

    async def hear(self, place: Conversation, message: Message) -> StoredMessage:
        """Commit a message at a place; `answer` answers it later."""
        heard = await self.store.database.call(self.store.add_message_at, place, _clean_message(message))
        _log_stored(heard.message)
        return heard

    async def overhear(self, place: Conversation, said: Sequence[Message], until: datetime) -> None:
        """Commit messages, oldest first, that people exchanged at a place before `until`, as context for questions there.

        They are shown and forgotten like messages to kibitz. Messages that are committed already stay unchanged.
        """
        if said:
            storable = [_clean_message(one) for one in said]
            await self.store.database.call(self.store.add_earlier_messages, place, storable, until)
            self.tracker.recall.embed_later(storable)

    async def decline(self, place: Conversation, event_id: str) -> bool:
        """Commit that a message never gets an answer, without its text. Return False if its event is known already."""
        return (await self.hear(place, Message("", FORGOTTEN, "", event_id=event_id))).is_new

    async def regenerate(self, turn_id: str, user_id: str, options: ReplyOptions = DEFAULT_OPTIONS) -> Turn:
        """Answer the same message again, and record a regeneration as feedback on the first answer.

        There is no such feedback if the question was edited since: the first answer was to other words.
        """
        turn = await self._turn(turn_id)
        message = await self.store.database.call(self.store.read_message, turn.message_id)
        if message.edited_at is None or message.edited_at < turn.at:
            await self.record_feedback(Feedback(turn.id, user_id, FeedbackKind.REGENERATE, signal="regenerate"))
        return await self._answer(message, await self.tracker.build_context(message), turn.asker_id, turn, options)

    async def edit(self, event_id: str, text: str, at: datetime) -> None:
        """Store the new text of a message that its author edited. Answers stay as they were."""
        call = self.store.database.call
        message = await call(self.store.find_message_of_event, event_id)
        if message is not None and await call(self.store.edit_message, message.id, clean_text(text), at):
            await self.tracker.recall.mark_changed(message.conversation_id)
            self.tracker.recall.embed_later([replace(message, text=clean_text(text))])

    async def delete(self, event_id: str) -> None:
        """Forget a message that its author deleted, and all that was made from it."""
        message = await self.store.database.call(self.store.find_message_of_event, event_id)
        if message is not None:
            await self.forget(message.id)

    async def forget(self, message_id: str) -> None:
        """Forget a message and all that was made from it."""
        await self.store.database.call(forget_message, self.store.database, message_id)

    async def record_feedback(self, given: Feedback) -> bool:
        """Commit one act of feedback. Return False if its event is known already."""
        given = replace(given, text=None if given.text is None else clean_text(given.text))
        with working_on(turn=given.turn_id):
            is_new = await self.store.database.call(self.store.add_feedback, given)
            act = "takes back" if given.retracts else "gives"
            log.debug("stored feedback %s, which %s %s%s", given.id, act, given.kind, "" if is_new else " again")
            if given.text and not given.retracts:
                log_text("feedback", given.text)
        if is_new:
            self.sampler.notice_feedback()
        return is_new

    async def retract(self, feedback_id: str, user_id: str) -> bool:
        """Take back an act of feedback by this person. Return False if there is none."""
        given = await self.store.database.call(self.store.find_feedback, feedback_id)
        if given is None or given.user_id != user_id:
            return False
        if given.signal == PICK:
            standing = await self.store.database.call(find_pick, self.store, given.turn_id, user_id)
            return given in standing and await self.retract_pick(Pick(given.turn_id, user_id, prefers_new=False))
        taken_back = replace(given, id=new_id(), at=now(), event_id=None, retracts=True)
        return await self.record_feedback(taken_back)

    async def record_pick(self, pick: Pick) -> list[Feedback]:
        """Commit a pick as `bot.store.picks.record_pick` does, and return its acts. Raises DataError as it does."""
        with working_on(turn=pick.turn_id):
            acts = await self.store.database.call(record_pick, self.store, pick)
            self.sampler.notice_feedback()
            log.debug("stored the pick of the %s answer", "new" if pick.prefers_new else "earlier")
        return acts

    async def retract_pick(self, pick: Pick) -> bool:
        """Take back a person's pick between a turn and the answer that it replaces. Return False if there is none."""
        with working_on(turn=pick.turn_id):
            is_new = await self.store.database.call(retract_pick, self.store, pick)
            self.sampler.notice_feedback()
            log.debug("took back the pick%s", "" if is_new else ", of which there is none")
        return is_new

    async def explain(self, turn_id: str) -> Explanation:
        """Return a turn and the feedback on it; `learning.data.explanation` computes its reward. Raises DataError if there
        is no such turn.
        """
        turn = await self._turn(turn_id)
        said = await self.store.database.call(self.store.read_feedback_on, [turn_id])
        return Explanation(turn, said.get(turn_id, []))

    def _store_and_read(self, message: Message, place: Conversation | None, options: ReplyOptions) -> StoredQuestion:
        """Store a message; return it with its answer, if it has one, or else with its surroundings."""
        if place is None:
            return self._claim(message, None)
        heard = self.store.add_message_at(place, message)
        if heard.is_new and options.has_client_history:
            add_fingerprint(self.store.database, heard.message, message.author_id)
        return self._find_or_read(heard)

    def _store_with_history(
        self, message: Message, place: Conversation, history: Sequence[Message]
    ) -> tuple[Message, list[Message]]:
        """Store a message; return it with those messages of the history that were said to kibitz."""
        known = find_repeated_messages(self.store.database, place, message.author_id, history)
        heard = self.store.add_message_at(place, message)
        add_fingerprint(self.store.database, heard.message, message.author_id)
        return heard.message, known

    def _read_again(self, heard: StoredMessage) -> StoredQuestion:
        """Read a stored message again, since it may have been edited or forgotten; return the same as `_store_and_read`."""
        return self._find_or_read(
            replace(heard, message=self.store.read_message(heard.message.id)) if heard.is_new else heard
        )

    def _find_or_read(self, heard: StoredMessage) -> StoredQuestion:
        if not heard.is_new:
            return self._claim(heard.message, heard.place)
        return heard.message, None, self.tracker.read_surroundings(heard.message, heard.place)

    def _claim(self, message: Message, place: Conversation | None) -> StoredQuestion:
        first, answered = self.store.find_or_add_message(message)
        wanted = answered is None and not first.is_forgotten
        return first, answered, self.tracker.read_surroundings(first, place) if wanted else None

    async def _answer(
        self, message: Message, context: Context, asker_id: str, rival: Turn | None, options: ReplyOptions
    ) -> Turn:
        turn_id = options.turn_id or new_id()
        with working_on(turn=turn_id):
            with self.tracker.recall.answering():
                reply, selection = await self._sample(message, context, asker_id, rival, options)
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
                replaces=None if rival is None else rival.id,
                shown=context.shown,
                selection=selection,
                id=turn_id,
            )
            answer = Message(turn.conversation_id, "", turn.text, Role.ASSISTANT, id=turn.reply_id)
            stored = self.store.database.call(self._store_turn, turn, answer if options.has_client_history else None)
            try:
                if options.on_turn is not None:
                    await options.on_turn(turn)
            finally:
                await stored
                self.tracker.recall.embed_later([message, answer])
                if rival is None:
                    self._follow_up_tasks.add(task := asyncio.create_task(self._record_follow_up(message)))
                    task.add_done_callback(self._follow_up_tasks.discard)
            tokens = len(turn.completion_ids or ())
            told = turn.policy_version, tokens, turn.latency_ms, turn.finish_reason
            log.debug("answered message %s: %s, %d tokens in %.0f ms (%s)", message.id, *told)
            log_text("answer", turn.text)
        return turn

    def _store_turn(self, turn: Turn, repeatable: Message | None) -> None:
        self.store.add_turn(turn)
        if repeatable is not None:
            add_fingerprint(self.store.database, repeatable, turn.asker_id)

    async def _record_follow_up(self, message: Message) -> None:
        """Record a message as a follow-up to the answer before it. An error is logged, so that the chat goes on."""
        try:
            await self.followups.record(message)
        except Exception:
            log.exception("cannot record a follow-up")

    async def _sample(
        self, message: Message, context: Context, asker_id: str, rival: Turn | None, options: ReplyOptions
    ) -> tuple[Reply, Selection | None]:
        # Without it, the timing of the prefix cache reveals texts of other conversations (CVE-2025-46570).
        salt = hashlib.blake2b(message.conversation_id.encode(), key=self._secret).hexdigest()
        try:
            return await self.sampler.sample(
                context.prompt_ids,
                asker_id,
                rival=rival,
                most=options.candidates,
                on_text=options.on_text,
                stop=options.stop,
                seed=options.seed,
                cache_salt=salt,
                max_tokens=options.max_tokens,
                stops=options.stops,
            )
        except ReplyInterrupted as broken:
            return Reply(broken.text, broken.version, (), (), (), INTERRUPTED, SamplingParams(), 0.0), None

    async def _turn(self, turn_id: str) -> Turn:
        turn = await self.store.database.call(self.store.find_turn, turn_id)
        if turn is None:
            raise DataError(f"there is no turn '{turn_id}'")
        return turn
