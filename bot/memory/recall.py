"""Recall: finds the earlier messages that bear on a new one, among all that its conversation may see.

It keeps the newest messages of a scope in memory (the least recently used scopes are dropped first), and reads new ones from
the database on each use. Among older messages the database finds those that share the rarest words with the new one, and
both are ranked together. The best are then read from the database, so that no message is shown that was forgotten or
withheld meanwhile. New messages are embedded after the answer is sent.
"""

import asyncio
import contextlib
import json
import logging
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bot.config import DialogueConfig
from bot.errors import ConfigError
from bot.memory.embedder import BATCH, Embedder, make_embedder
from bot.memory.index import Entry, ScopeIndex, Weights
from bot.memory.scope import Memory, MessageText
from bot.store.database import Database
from bot.store.tables import CHUNK
from bot.store.words import clear_stem_cache
from bot.types import Conversation, Message, Progress

log = logging.getLogger(__name__)

WEIGHTS_FILE = Path(__file__).parent / "retrieval_weights.json"
WINDOW = 3_000  # newest messages of one scope in memory; up to a quarter more, so that dropping is rare
OLDER = 32  # messages before the window that are ranked with it
ROWS = 50_000  # messages in memory, of all scopes together
GATHER_SECONDS = 0.5  # in which messages are gathered, to be embedded together
IDLE_WAIT_SECONDS = 1.0  # the longest wait for a moment in which nobody waits for an answer
BUSY_BATCH_SIZE = 16  # texts
WRITE_BATCH_SIZE = 4  # vectors written at once, so that answers can use the database in between
OVERLAP = 64  # messages that are read again, because messages of one moment may be committed in another order
LOOKUP_FACTOR = 4  # messages looked up per wanted one, because some may not be shown


@dataclass(frozen=True)
class RecalledMessage:
    """An earlier message, its score for the new one, and whether it is near enough to be shown."""

    message: Message
    score: float
    is_near: bool


@dataclass(frozen=True)
class ScopeContents:
    """The messages that a conversation may see: the index of the newest, the `unread` ones that the index lacks, and `older`
    ones that share words with the new message.
    """

    index: ScopeIndex
    unread: list[Entry]
    older: list[Entry]


def load_retrieval_weights(file: str = "") -> dict[str, float]:
    """Load the weights of the signals from a file of `kibitz fit-retrieval`, or the built-in ones for "".

    Raises ConfigError if the file has no weights.
    """
    shipped: dict[str, float] = json.loads(WEIGHTS_FILE.read_text())["weights"]
    if not file:
        return shipped
    try:
        learned = json.loads(Path(file).read_text())["weights"]
        return {name: float(learned[name]) for name in shipped}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"config key dialogue.retrieval_weights has value '{file}', which has no weights ({error!r}); "
            "make it with `kibitz fit-retrieval --out FILE`, or leave the key empty"
        ) from error


class Recall:
    """The search in earlier messages, with its indexes in memory and its queue of messages to embed."""

    def __init__(self, memory: Memory, embedder: Embedder | None, learned: Weights):
        self.memory = memory
        self.embedder = embedder
        self.weights = learned
        self.space = "" if embedder is None else embedder.space
        self._call = memory.database.call
        self._scopes: OrderedDict[str, ScopeIndex] = OrderedDict()  # used only in the database's thread
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recall")
        self._waiting: deque[MessageText] = deque(maxlen=ROWS)  # dropped ones are embedded at the next start
        self._embedding_task: asyncio.Task[None] | None = None
        self._answers = 0  # that are being made
        self._idle = asyncio.Event()
        self._idle.set()

    async def load_embedder(self) -> None:
        """Load the embedder. Raises ConfigError if it cannot be loaded."""
        if self.embedder is not None:
            await self.embedder.embed(["ready"])

    async def find(
        self, message: Message, limit: int, without: Collection[str] = (), scope: ScopeContents | None = None
    ) -> list[RecalledMessage]:
        """Return the `limit` messages before this one that bear most on it, best first, without those in `without`.

        The message's scope is read if `scope` is None.
        """
        if scope is None:
            scope = await self._call(self._read_scope_for, message)
        index = await self.update_index(scope)
        if not len(index):
            return []
        loop = asyncio.get_running_loop()
        ranked = await loop.run_in_executor(
            self._thread, self._rank, index, scope.older, message, limit * LOOKUP_FACTOR, without
        )
        there = await self._call(self.memory.find_visible, message.conversation_id, [one for one, *_ in ranked])
        return [RecalledMessage(there[one], score, near) for one, score, near in ranked if one in there][:limit]

    def embed_later(self, said: Sequence[Message]) -> None:
        """Embed messages soon, in the background."""
        if self.embedder is not None:
            self._waiting.extend((message.id, message.text) for message in said if message.text.strip())
            if self._waiting and (self._embedding_task is None or self._embedding_task.done()):
                self._embedding_task = asyncio.create_task(self._embed_waiting())

    async def flush(self) -> None:
        """Wait until all waiting messages are embedded."""
        while self._embedding_task is not None and not self._embedding_task.done():
            await asyncio.wait([self._embedding_task])

    async def embed_missing(self, progress: Progress) -> None:
        """Embed all messages without a vector of this model, for example after an import or a change of the model."""
        if self.embedder is None:
            return
        total, done, after = await self._call(self.memory.count_unembedded, self.space), 0, ""
        while texts := await self._call(self.memory.find_unembedded, self.space, after, BATCH):
            await self._embed(texts)
            done, after = done + len(texts), texts[-1][0]
            progress(f"embedding with {self.embedder.name}", done, max(done, total))  # new messages may come meanwhile
        if done:
            await self._call(self._scopes.clear)

    async def mark_changed(self, conversation_id: str) -> None:
        """Mark a conversation as changed. Its scope is reloaded on next use."""
        await self._call(
            lambda: self._scopes.pop(self.memory.scope_key(self.memory.read_conversation(conversation_id)), None)
        )

    async def drop_forgotten(self) -> None:
        """Drop all forgotten messages from memory, including those that another process forgot."""
        held = await self._call(lambda: {scope: [*index.ids] for scope, index in self._scopes.items()})
        waiting = {message_id for message_id, _ in self._waiting}
        ids = sorted(waiting.union(*held.values()))
        gone: set[str] = set()
        for start in range(0, len(ids), CHUNK):  # so that answers can use the database's thread in between
            some = ids[start : start + CHUNK]
            gone |= set(some) - await self._call(self.memory.find_remaining, some)
        await self.drop(gone)

    async def drop(self, message_ids: Collection[str]) -> None:
        """Drop these messages from memory. Scopes that contain any are reloaded on next use."""
        gone = set(message_ids)
        for one in [one for one in self._waiting if one[0] in gone]:
            self._waiting.remove(one)
        await self._call(self._drop, gone)
        clear_stem_cache()

    def _drop(self, message_ids: set[str]) -> None:
        held = [scope for scope, index in self._scopes.items() if not message_ids.isdisjoint(index.rows)]
        for scope in held:
            del self._scopes[scope]

    def close(self) -> None:
        """End the threads. Messages that still wait are embedded at the next start."""
        if self._embedding_task is not None:
            self._embedding_task.cancel()
        self._thread.shutdown()
        if self.embedder is not None:
            self.embedder.close()

    def read_scope(self, place: Conversation, question: str = "") -> ScopeContents:
        """Read the committed scope of a conversation, for a question. Call it in the database's thread."""
        scope = self.memory.scope_key(place)
        index = self._scopes.pop(scope, None) or ScopeIndex()
        after = index.ids[-OVERLAP] if len(index) >= OVERLAP else ""
        unread = self.memory.read_since(place, after, self.space, WINDOW)
        if len(unread) == WINDOW:  # there may be unread messages between these and the index
            index = ScopeIndex()
        self._scopes[scope] = index
        while len(self._scopes) > 1 and sum(map(len, self._scopes.values())) > ROWS:
            self._scopes.popitem(last=False)
        older: list[Entry] = []
        if len(index) + len(unread) >= WINDOW:
            first = index.ids[0] if len(index) else unread[0].id
            older = self.memory.find_older(place, question, first, self.space, OLDER)
        return ScopeContents(index, [one for one in unread if index.is_missing(one)], older)

    def _read_scope_for(self, message: Message) -> ScopeContents:
        return self.read_scope(self.memory.read_conversation(message.conversation_id), message.text)

    async def update_index(self, scope: ScopeContents) -> ScopeIndex:
        """Add the unread messages to the index of a scope, and return it."""
        if scope.unread:
            await asyncio.get_running_loop().run_in_executor(self._thread, _add, scope.index, scope.unread)
        return scope.index

    def _rank(
        self, index: ScopeIndex, older: Sequence[Entry], message: Message, limit: int, without: Collection[str]
    ) -> list[tuple[str, float, bool]]:
        if older:
            index = index.with_older(older, message.text)
        vector = None
        if self.embedder is not None:
            vector = self.embedder.encode([index.extract_speakers(message.text, message.author_id)[1]])[0]
        order, scores = index.rank(message.text, vector, message.author_id, self.weights)
        near = index.find_near(message.text, vector, message.author_id)
        wanted = (row for row in order if index.ids[row] < message.id and index.ids[row] not in without)
        return [(index.ids[row], float(scores[row]), bool(near[row])) for row, _ in zip(wanted, range(limit), strict=False)]

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within the context, somebody waits for an answer, and embedding is put off."""
        self._answers += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._answers -= 1
            if not self._answers:
                self._idle.set()

    async def _embed_waiting(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        while self._waiting:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), IDLE_WAIT_SECONDS)
            most = BATCH if self._idle.is_set() else BUSY_BATCH_SIZE
            texts = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            try:
                await self._embed(texts)
            except Exception:  # the chat goes on: words still find these messages, and the next start embeds them
                log.exception("cannot embed %d messages", len(texts))

    async def _embed(self, texts: Sequence[MessageText]) -> None:
        assert self.embedder is not None
        vectors: np.ndarray = await self.embedder.embed([text for _, text in texts])
        for start in range(0, len(texts), WRITE_BATCH_SIZE):
            part = slice(start, start + WRITE_BATCH_SIZE)
            kept, indexes = await self._call(self._store_vectors, texts[part], vectors[part])
            if indexes:
                await asyncio.get_running_loop().run_in_executor(self._thread, _add_vectors, indexes, kept)

    def _store_vectors(
        self, texts: Sequence[MessageText], vectors: np.ndarray
    ) -> tuple[dict[str, np.ndarray], list[ScopeIndex]]:
        """Store vectors; return the stored ones, and the indexes with such a message. Call it in the database's thread."""
        kept = self.memory.store_vectors(texts, vectors, self.space)
        return kept, [index for index in self._scopes.values() if not kept.keys().isdisjoint(index.rows)]


def _add(index: ScopeIndex, unread: Sequence[Entry]) -> None:
    index.add(unread)
    if len(index) > WINDOW + WINDOW // 4:
        index.drop_oldest(len(index) - WINDOW)


def _add_vectors(indexes: Sequence[ScopeIndex], vectors: Mapping[str, np.ndarray]) -> None:
    for index in indexes:
        index.add_vectors(vectors)


def make_recall(dialogue: DialogueConfig, data: Path, database: Database) -> Recall:
    """Return the Recall that a config describes."""
    learned = load_retrieval_weights(dialogue.retrieval_weights)
    return Recall(Memory(database, dialogue.across_channels), make_embedder(dialogue, data), learned)
