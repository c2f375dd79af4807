"""Recall: finds the earlier messages that bear on a new one, in all that its conversation may see.

The newest messages of a scope are kept in memory while they are asked for (the scopes that were asked least lately go
first); each time what is new is read from the database. Of what is older the database finds what shares the rarest words
with the new message, and both are ranked together. What is found is looked up there again, so that nothing is shown that was
forgotten or withheld a moment ago. Embeddings of what was said are made after the answer was sent. It knows no prompt and
no policy.
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

from bot.config import Config
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
WINDOW = 3_000  # messages of one scope in memory: the newest; up to a quarter more, so that few have to go at a time
OLDER = 32  # messages before those that are ranked with them
ROWS = 50_000  # messages in memory, of all scopes together
GATHER_SECONDS = 0.5  # seconds in which what is said is gathered, to be embedded together
IDLE_WAIT_SECONDS = 1.0  # seconds that it waits for a moment in which nobody waits for an answer; then it embeds
BUSY_BATCH_SIZE = 16  # texts
WRITE_BATCH_SIZE = 4  # vectors written at once: whoever waits for an answer comes in between
OVERLAP = 64  # messages that are read again: what was said at the same moment may have been written in another order
LOOKUP_FACTOR = 4  # times as many are looked up as are wanted: some may not be shown


@dataclass(frozen=True)
class RecalledMessage:
    """An earlier message, how well it ranks for the new one, and whether it is near enough to be shown."""

    message: Message
    score: float
    is_near: bool


@dataclass(frozen=True)
class ScopeContents:
    """What a conversation may see: the index of its newest messages, what is `unread` (not yet in the index), and what is
    `older` than both and shares words with a new message.
    """

    index: ScopeIndex
    unread: list[Entry]
    older: list[Entry]


def load_retrieval_weights(file: str = "") -> dict[str, float]:
    """What each signal counts, as `kibitz fit-retrieval` learned it; "" is what ships. Raises ConfigError."""
    shipped: dict[str, float] = json.loads(WEIGHTS_FILE.read_text())["weights"]
    if not file:
        return shipped
    try:
        learned = json.loads(Path(file).read_text())["weights"]
        return {name: float(learned[name]) for name in shipped}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"config key dialogue.retrieval_weights has value '{file}', which holds no weights ({error!r}); "
            "make it with `kibitz fit-retrieval --out FILE`, or leave the key empty"
        ) from error


class Recall:
    """What may be remembered, found."""

    def __init__(self, memory: Memory, embedder: Embedder | None, learned: Weights):
        self.memory = memory
        self.embedder = embedder
        self.weights = learned
        self.space = "" if embedder is None else embedder.space
        self._call = memory.database.call
        self._scopes: OrderedDict[str, ScopeIndex] = OrderedDict()  # only the database's thread touches it
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recall")
        self._waiting: deque[MessageText] = deque(maxlen=ROWS)  # of a flood the oldest is embedded at the next start
        self._embedding_task: asyncio.Task[None] | None = None
        self._answers = 0  # that somebody waits for
        self._idle = asyncio.Event()
        self._idle.set()

    async def load_embedder(self) -> None:
        """Load the embedder. Raises ConfigError where it cannot be."""
        if self.embedder is not None:
            await self.embedder.embed(["ready"])

    async def find(
        self, message: Message, limit: int, without: Collection[str] = (), scope: ScopeContents | None = None
    ) -> list[RecalledMessage]:
        """The `limit` messages before this one that bear most on it, best first; none of `without`.

        `scope` is the message's, where that was read already.
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
        """Have messages embedded soon. Never waits."""
        if self.embedder is not None:
            self._waiting.extend((message.id, message.text) for message in said if message.text.strip())
            if self._waiting and (self._embedding_task is None or self._embedding_task.done()):
                self._embedding_task = asyncio.create_task(self._embed_waiting())

    async def flush(self) -> None:
        """Wait until what was to be embedded is."""
        while self._embedding_task is not None and not self._embedding_task.done():
            await asyncio.wait([self._embedding_task])

    async def embed_missing(self, progress: Progress) -> None:
        """Embed all that has no vector of this model: what was imported, or was said under another one."""
        if self.embedder is None:
            return
        total, done, after = await self._call(self.memory.count_unembedded, self.space), 0, ""
        while texts := await self._call(self.memory.find_unembedded, self.space, after, BATCH):
            await self._embed(texts)
            done, after = done + len(texts), texts[-1][0]
            progress(f"embedding with {self.embedder.name}", done, max(done, total))  # more may be said meanwhile
        if done:
            await self._call(self._scopes.clear)

    async def mark_changed(self, conversation_id: str) -> None:
        """Something in a conversation changed other than by being added: its scope is read anew when it is asked for."""
        await self._call(
            lambda: self._scopes.pop(self.memory.scope_key(self.memory.read_conversation(conversation_id)), None)
        )

    async def drop_forgotten(self) -> None:
        """Keep nothing in memory of messages that were forgotten, whoever forgot them: this may be another process."""
        held = await self._call(lambda: {scope: [*index.ids] for scope, index in self._scopes.items()})
        waiting = {message_id for message_id, _ in self._waiting}
        ids = sorted(waiting.union(*held.values()))
        gone: set[str] = set()
        for start in range(0, len(ids), CHUNK):  # whoever waits for an answer comes in between
            some = ids[start : start + CHUNK]
            gone |= set(some) - await self._call(self.memory.find_remaining, some)
        await self.drop(gone)

    async def drop(self, message_ids: Collection[str]) -> None:
        """Keep nothing in memory of these messages. Scopes that hold any are read anew when they are asked for."""
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
        """End the threads; what still waits to be embedded is at the next start."""
        if self._embedding_task is not None:
            self._embedding_task.cancel()
        self._thread.shutdown()
        if self.embedder is not None:
            self.embedder.close()

    def read_scope(self, place: Conversation, question: str = "") -> ScopeContents:
        """The scope of a conversation, as it is committed by now, for a question. In the database's thread."""
        scope = self.memory.scope_key(place)
        index = self._scopes.pop(scope, None) or ScopeIndex()
        after = index.ids[-OVERLAP] if len(index) >= OVERLAP else ""
        unread = self.memory.read_since(place, after, self.space, WINDOW)
        if len(unread) == WINDOW:  # between these and what was read before may be others
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
        """The index of a scope, with what was unread."""
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
        """While somebody waits for an answer, what was said is not yet embedded."""
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
            except Exception:  # the chat goes on; what has no vector is found by its words, and embedded at the next start
                log.exception("%d messages could not be embedded", len(texts))

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
        """Keep vectors; what was kept, and the indexes that hold a message of theirs. In the database's thread."""
        kept = self.memory.store_vectors(texts, vectors, self.space)
        return kept, [index for index in self._scopes.values() if not kept.keys().isdisjoint(index.rows)]


def _add(index: ScopeIndex, unread: Sequence[Entry]) -> None:
    index.add(unread)
    if len(index) > WINDOW + WINDOW // 4:
        index.drop_oldest(len(index) - WINDOW)


def _add_vectors(indexes: Sequence[ScopeIndex], vectors: Mapping[str, np.ndarray]) -> None:
    for index in indexes:
        index.add_vectors(vectors)


def make_recall(config: Config, database: Database) -> Recall:
    """Return what finds what may be remembered, as a config says."""
    learned = load_retrieval_weights(config.dialogue.retrieval_weights)
    return Recall(Memory(database, config.dialogue.across_channels), make_embedder(config), learned)
