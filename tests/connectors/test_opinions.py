"""An opinion counts once: however events, the flood limit and the reading of a platform's API meet."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import pytest_asyncio
from conftest import answered, until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.chat.tracker import StateTracker
from bot.config import AccessConfig, PrivacyConfig, ReactionsConfig
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import Policy
from bot.store.deliveries import Deliveries
from bot.store.feedback import select_effective
from bot.store.forgetting import forget_person
from bot.store.users import Users
from bot.types import Feedback, FeedbackKind, new_id, now
from connectors import opinions
from connectors.access import Access
from connectors.answers import Answers
from connectors.base import Services
from connectors.opinions import Opinions, ReactionSnapshot

LIKED = FeedbackKind.APPROVAL
PATIENT = AccessConfig(opinions_per_minute=1_000_000)


class Life:
    """One person's 👍 on one answer: it comes and goes on the platform, and its events arrive later, in order."""

    def __init__(self, answers: Answers, access: Access, turn_id: str):
        self.answers, self.access, self.turn_id, self.message = answers, access, turn_id, new_id()
        self.answers.deliveries.add("test", "channel", self.message, turn_id, 0)
        self.user, self.shed_before = new_id(), access.shed_count
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
        self.answers.opinions._waiting += opinions.MOST_WAITING * in_flood
        task = asyncio.create_task(self.answers.record_reaction("channel", self.message, given))
        await asyncio.sleep(0)
        self.answers.opinions._waiting -= opinions.MOST_WAITING * in_flood
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
            await self.answers.reconcile_reactions(
                self.turn_id, ReactionSnapshot([self.message], there, read_at), lambda user: True
            )

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
        said = await self.answers.dialogue.store.database.call(self.answers.dialogue.store.read_feedback_on, [self.turn_id])
        return [row for row in said.get(self.turn_id, []) if row.user_id == self.user]


@pytest_asyncio.fixture(loop_scope="session")
async def answers(config, database, store, tokenizer, registry) -> AsyncIterator[Answers]:
    recall = Recall(Memory(database), None, load_retrieval_weights())
    tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
    policy = Policy("http://127.0.0.1:9", config.policy)  # nobody is answered here
    ledger, reactions, users = Deliveries(database), Reactions(ReactionsConfig()), Users(database, PrivacyConfig())
    yield Answers(Services(DialogueManager(store, tracker, policy), ledger, reactions, Access(PATIENT), users, None), "test")
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
        assert len(rows) + access.shed_count - life.shed_before == life.acts
        assert bool(select_effective(rows)) == life.is_there

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
    assert access.shed_count == 2, "b and c: a is recorded"
    access._opinions.seconds = 0.0  # the minute is over
    assert comes("b")
    assert access.shed_count == 1


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(opinions, "MOST_REMEMBERED", 3)
    access = Access(AccessConfig(opinions_per_minute=1))
    shed = Opinions(access, "test")
    for number in range(6):
        for _ in range(2):
            with shed.take(Feedback("", f"user {number}", LIKED, "👍", event_id=new_id()), f"message {number}"):
                pass
    assert access.shed_count == 6
    assert len(shed._shed) == len(shed._events) == 3


async def opinions_on(answers: Answers, turn_id: str) -> dict[str, FeedbackKind]:
    rows = await answers.dialogue.store.database.call(answers.dialogue.store.read_feedback_on, [turn_id])
    return {row.user_id: row.kind for row in select_effective(rows.get(turn_id, []))}


async def shown_turn(answers: Answers, store, tokenizer) -> tuple[str, str]:
    """A stored turn and the message that shows it."""
    turn, message = answered(store, tokenizer, "hello", "Hey!"), new_id()
    answers.deliveries.add("test", "channel", message, turn.id, 0)
    return turn.id, message


async def test_reading_the_api_adds_no_reactions_of_people_who_are_not_admitted(answers, store, tokenizer):
    turn_id, message = await shown_turn(answers, store, tokenizer)
    access = Access(AccessConfig(deny_users=["mallory"]))
    there = {(message, "mallory", "👎"), (message, "ann", "👍")}
    await answers.reconcile_reactions(turn_id, ReactionSnapshot([message], there, now()), access.admits)
    assert await opinions_on(answers, turn_id) == {"ann": LIKED}
    await answers.reconcile_reactions(turn_id, ReactionSnapshot([message], there, now()), lambda user: True)  # the control
    assert (await opinions_on(answers, turn_id)).keys() == {"ann", "mallory"}
    await answers.reconcile_reactions(
        turn_id, ReactionSnapshot([message], there, now()), access.admits
    )  # it is there: nobody took it back
    assert (await opinions_on(answers, turn_id)).keys() == {"ann", "mallory"}


async def test_of_whoever_was_forgotten_only_opinions_on_later_answers_are_read_from_the_api(
    answers, store, tokenizer, database, registry
):
    (old, old_message), (grew, grew_message) = [await shown_turn(answers, store, tokenizer) for _ in range(2)]
    forget_person(database, registry, "test", "bob")
    part = new_id()
    answers.deliveries.add("test", "channel", part, grew, 1)  # the second part of an answer that was half shown
    answers.users.record_consent("test", "bob", True)
    new, new_message = await shown_turn(answers, store, tokenizer)
    for turn_id, messages in ((old, [old_message]), (grew, [grew_message, part]), (new, [new_message])):
        there = {(messages[-1], user, "👍") for user in ("ann", "bob")}
        await answers.reconcile_reactions(turn_id, ReactionSnapshot(messages, there, now()), lambda user: True)
    assert [(await opinions_on(answers, one)).keys() for one in (old, grew, new)] == [{"ann"}, {"ann"}, {"ann", "bob"}]
    forget_person(database, registry, "test", "bob")  # once more: the last time counts
    reading = ReactionSnapshot([new_message], {(new_message, "bob", "👍")}, now())
    await answers.reconcile_reactions(new, reading, lambda user: True)
    assert "bob" not in await opinions_on(answers, new)


async def test_who_is_not_listed_has_taken_nothing_back_where_not_all_are_listed(answers, store, tokenizer):
    turn_id, message = await shown_turn(answers, store, tokenizer)
    both = {(message, "ann", "👍"), (message, "bob", "👍")}
    await answers.reconcile_reactions(turn_id, ReactionSnapshot([message], both, now()), lambda user: True)
    only_ann = {(message, "ann", "👍")}
    await answers.reconcile_reactions(
        turn_id, ReactionSnapshot([message], only_ann, now(), incomplete={"👍"}), lambda user: True
    )
    assert (await opinions_on(answers, turn_id)).keys() == {"ann", "bob"}
    await answers.reconcile_reactions(
        turn_id, ReactionSnapshot([message], only_ann, now()), lambda user: True
    )  # the control
    assert (await opinions_on(answers, turn_id)).keys() == {"ann"}


async def test_whoever_gave_a_reaction_may_take_it_back_and_nobody_else_leaves_a_trace(answers, store, tokenizer):
    turn_id, message = await shown_turn(answers, store, tokenizer)

    async def reacts(user: str, retracts: bool, is_admitted: bool) -> None:
        given = Feedback("", user, LIKED, "👍", retracts=retracts)
        await answers.record_reaction("channel", message, given, is_admitted)

    await reacts("mallory", retracts=False, is_admitted=False)
    await reacts("mallory", retracts=True, is_admitted=False)
    await reacts("ann", retracts=False, is_admitted=True)
    assert await opinions_on(answers, turn_id) == {"ann": LIKED}
    await reacts("ann", retracts=True, is_admitted=False)  # Discord does not say which roles she has
    assert await opinions_on(answers, turn_id) == {}
    assert {row.user_id for row in store.read_feedback_on([turn_id])[turn_id]} == {"ann"}


async def test_an_opinion_that_is_too_many_is_not_said_to_be_recorded(answers, store, tokenizer, monkeypatch):
    turn_id, _ = await shown_turn(answers, store, tokenizer)
    monkeypatch.setattr(answers.opinions, "_access", Access(AccessConfig(opinions_per_minute=1)))
    given = [Feedback(turn_id, "ann", kind, signal="button") for kind in (LIKED, FeedbackKind.DISAPPROVAL)]
    assert [await answers.record_opinion(one) for one in given] == [True, False]
    assert await opinions_on(answers, turn_id) == {"ann": LIKED}
