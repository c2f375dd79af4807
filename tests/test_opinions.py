"""An opinion counts once: however events, the flood limit and the reading of a platform's API meet."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import pytest_asyncio
from conftest import answered, until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bot.config import AccessConfig, PrivacyConfig, ReactionsConfig
from bot.deliveries import Deliveries
from bot.dialogue import DialogueManager
from bot.feedback import standing
from bot.memory import Memory
from bot.policy import Policy
from bot.reactions import Reactions
from bot.recall import Recall, weights
from bot.tracker import StateTracker
from bot.types import Feedback, FeedbackKind, new_id, now
from bot.users import Users
from connectors import opinions
from connectors.access import Access
from connectors.answers import Answers
from connectors.base import Shared
from connectors.opinions import Opinions

LIKED = FeedbackKind.APPROVAL
PATIENT = AccessConfig(opinions_per_minute=1_000_000)


class Life:
    """One person's 👍 on one answer: it comes and goes on the platform, and its events arrive later, in order."""

    def __init__(self, answers: Answers, access: Access, turn_id: str):
        self.answers, self.access, self.turn_id, self.message = answers, access, turn_id, new_id()
        self.answers.deliveries.add("test", "channel", self.message, turn_id, 0)
        self.user, self.shed_before = new_id(), access.shed
        self.is_there, self.acts = False, 0
        self.coming: deque[bool] = deque()
        self.writing: deque[tuple[asyncio.Task[None], asyncio.Event]] = deque()
        self.seen: tuple[bool, object] | None = None
        self.gates: dict[str, asyncio.Event] = {}

    def act(self) -> None:
        """The person clicks."""
        self.coming.append(self.is_there)
        self.is_there = not self.is_there
        self.acts += 1

    async def deliver(self, in_flood: bool = False) -> None:
        """The next event arrives; what is taken is being written from then on."""
        if not self.coming:
            return
        given = Feedback("", self.user, LIKED, "👍", retracts=self.coming.popleft())
        gate = self.gates[given.id] = asyncio.Event()
        self.answers.opinions._waiting += opinions.WAITING * in_flood
        task = asyncio.create_task(self.answers.reacted("channel", self.message, given))
        await asyncio.sleep(0)
        self.answers.opinions._waiting -= opinions.WAITING * in_flood
        self.writing.append((task, gate))

    async def write(self) -> None:
        """The oldest event that is being written is committed."""
        if self.writing:
            task, gate = self.writing.popleft()
            gate.set()
            await task

    def read(self) -> None:
        """The platform's API is asked what is there."""
        self.seen = self.seen or (self.is_there, now())

    async def compare(self) -> None:
        """What the API said is compared with what is recorded; once in a session."""
        if self.seen and self.seen[1] is not None:
            is_there, read_at = self.seen
            self.seen = (is_there, None)
            there = {(self.message, self.user, "👍")} if is_there else set()
            await self.answers.reconcile(self.turn_id, [self.message], there, read_at)

    async def end(self) -> list[Feedback]:
        """Everything arrives and is written, and the API is read once more; returns what is recorded."""
        while self.coming:
            await self.deliver()
        while self.writing:
            await self.write()
        await self.compare()
        self.seen = None
        self.read()
        await self.compare()
        said = await self.answers.dialogue.store.database.call(self.answers.dialogue.store.feedback_of, [self.turn_id])
        return [row for row in said.get(self.turn_id, []) if row.user_id == self.user]


@pytest_asyncio.fixture(loop_scope="session")
async def answers(config, database, store, tokenizer, registry) -> AsyncIterator[Answers]:
    recall = Recall(Memory(database), None, weights())
    tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
    policy = Policy("http://127.0.0.1:9", config.policy)  # nobody is answered here
    ledger, reactions, users = Deliveries(database), Reactions(ReactionsConfig()), Users(database, PrivacyConfig())
    yield Answers(Shared(DialogueManager(store, tracker, policy), ledger, reactions, Access(PATIENT), users, None), "test")
    await policy.close()


MOVES = ["act", "act", "deliver", "deliver", "flood", "write", "read", "compare"]


async def test_each_event_is_recorded_or_shed_and_in_the_end_what_is_there_stands(answers, store, tokenizer, monkeypatch):
    access, record = answers.opinions._access, answers.dialogue.record_feedback
    turn = answered(store, tokenizer, "hello", "Hey!")
    lives: list[Life] = []

    async def late(given: Feedback) -> bool:
        gate = next((life.gates[given.id] for life in lives if given.id in life.gates), None)
        if gate is not None:
            await gate.wait()
        return await record(given)

    monkeypatch.setattr(answers.dialogue, "record_feedback", late)

    async def holds(moves: list[str]) -> None:
        life = Life(answers, access, turn.id)
        lives.append(life)
        for move in moves:
            if move in ("act", "read"):
                getattr(life, move)()
            elif move == "flood":
                await life.deliver(in_flood=True)
            else:
                await getattr(life, move)()
        rows = await life.end()
        assert len(rows) + access.shed - life.shed_before == life.acts
        assert bool(standing(rows)) == life.is_there

    loop = asyncio.get_running_loop()

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(moves=st.lists(st.sampled_from(MOVES), max_size=24))
    @example(moves=["act", "act", "act", "flood", "flood", "read", "compare"])  # what is there is newer than what was shed
    def on_any_order(moves: list[str]) -> None:
        asyncio.run_coroutine_threadsafe(holds(moves), loop).result(600)

    await asyncio.to_thread(on_any_order)
    await until(lambda: not answers.opinions._waiting)


def test_an_event_that_is_delivered_again_is_counted_once():
    access = Access(AccessConfig(opinions_per_minute=1))
    taken = Opinions(access, "test")

    def comes(event_id: str) -> bool:
        with taken.take(Feedback("turn", "ann", LIKED, event_id=event_id)) as is_taken:
            return is_taken

    assert [comes(event) for event in ("a", "a", "b", "b", "c")] == [True, False, False, False, False]
    assert access.shed == 2, "b and c: a is recorded"
    access._opinions.seconds = 0.0  # the minute is over
    assert comes("b")
    assert access.shed == 1


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(opinions, "REMEMBERED", 3)
    access = Access(AccessConfig(opinions_per_minute=1))
    shed = Opinions(access, "test")
    for number in range(6):
        for _ in range(2):
            with shed.take(Feedback("", f"user {number}", LIKED, "👍", event_id=new_id()), f"message {number}"):
                pass
    assert access.shed == 6
    assert len(shed._shed) == len(shed._events) == 3
