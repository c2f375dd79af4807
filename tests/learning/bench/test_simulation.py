"""Simulated people show what few reactions change: the head's choice at once, and the weights apart from it."""

import asyncio
import contextlib
from dataclasses import dataclass, fields

import pytest_asyncio
import sqlalchemy as sa
from rich.console import Console

from bot.chat.dialogue import DialogueManager
from bot.chat.tracker import StateTracker
from bot.errors import NothingToLearn
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.policy import Policy
from bot.store.tables import feedback, turns
from bot.types import Conversation, Feedback, FeedbackKind, Message, new_id
from learning.bench import simulated_people, simulation, simulation_figures
from learning.bench.simulation import CurveRow, Simulation
from learning.data.replay_buffer import ReplayBuffer
from learning.rollout.deployment import Deployment
from learning.rollout.loop import OnlineLearner
from learning.rollout.selector import HeadSelector

PLAIN, LIKED = "Good day to you.", "Good day to you. 👋"
MESSAGES = 48


def answer_by_length(prompt: str) -> str:
    """Say what people like to half of the prompts."""
    return LIKED if len(prompt) % 2 else PLAIN


class WithoutRuns(OnlineLearner):
    """Never trains: what training does has tests of its own, with a real vLLM."""

    async def judge_waiting(self) -> bool:
        return False

    async def learn_once(self):
        raise NothingToLearn("no runs in this test")


@dataclass
class Talk:
    """A kibitz whose single answers please half of the time, and one of whose candidates always does."""

    dialogue: DialogueManager
    selector: HeadSelector
    learner: OnlineLearner
    told: list[str]

    def make_simulation(self, utility=simulated_people.emoji, selector: HeadSelector | None = None) -> Simulation:
        people = simulated_people.People(utility, reaction_rate=1.0, noise=0.0, seed=0)
        asked = simulated_people.read_prompts(is_toy=True)
        parts = self.dialogue, self.dialogue.policy, self.learner, selector
        return Simulation(*parts, people, asked, lambda *_: None)


@pytest_asyncio.fixture
async def talk(vllm, config, database, store, registry, tokenizer):
    vllm.says = [answer_by_length, PLAIN, LIKED, PLAIN, PLAIN, " ", PLAIN, PLAIN]
    policy, told = Policy(vllm.url, config.policy), []
    deployment = Deployment(policy, registry, config.serving, config.training, config.gate, told.append)
    recall = Recall(Memory(database), None, load_retrieval_weights())
    tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
    selector = HeadSelector(ReplayBuffer(store, tokenizer, config), None, seed=0)
    dialogue = DialogueManager(store, tracker, policy, selector, candidates=8)
    running = asyncio.create_task(selector.run())
    yield Talk(dialogue, selector, WithoutRuns(store, deployment, config, told.append), told)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await policy.close()
    recall.close()


def read_all(database, table: sa.Table) -> list[sa.Row]:
    with database.read() as connection:
        return [*connection.execute(sa.select(table).order_by(table.c.at))]


async def test_served_answers_and_weights_are_judged_apart_and_the_first_choice_is_told(talk, database, tmp_path):
    play = talk.make_simulation(selector=talk.selector)
    rows = await play.run(1, MESSAGES, 1, lambda row: talk.told.append(row.to_line()))
    assert [row.reactions for row in rows] == [0, *simulation.EARLY, MESSAGES]
    assert {(row.utility, row.gain) for row in rows} == {(rows[0].frozen, 0.0)}, "the weights are the base's"
    assert (rows[0].candidates, rows[0].served_utility) == (1, rows[0].frozen)
    for row in rows[1:]:
        assert row.candidates > 1
        assert row.served_low <= row.served_utility <= row.served_high
        assert row.served_gain == row.served_utility - row.frozen
    assert rows[-1].served_gain_low > 0.5, "one of its candidates always pleases"
    # What the database says. People talked one after the other then.
    said, answers = read_all(database, feedback), read_all(database, turns)
    assert (len(said), len(answers)) == (MESSAGES, MESSAGES), "judging stored nothing"
    first = next(row for row in answers if row.selection and row.selection.is_selected)
    count = play.first_choice_reactions
    assert count == sum(row.at < first.at for row in said)
    assert 12 <= count <= 20
    told = f"after {count} reactions: answers are chosen from {len(first.selection.candidates)} now"
    assert [line for line in talk.told if line.startswith("after")] == [told]
    figures = simulation_figures.compute_figures(play, "toy")
    assert figures["first_choice_reactions"] == count
    assert figures["last_served_utility"] == rows[-1].served_utility > figures["last_utility"]
    assert figures["served_gain_low"] <= figures["served_gain"] <= figures["served_gain_high"]
    assert set(figures["curve"][0]) == {one.name for one in fields(CurveRow)}
    assert {row["served"] for row in play.samples} == {LIKED} != {row["after"] for row in play.samples}
    shown = simulation_figures.describe_changes(play)
    assert shown.startswith(
        f"first change after {count} reactions: the reward head chooses among several answers (in each row from 20"
    )
    assert "no trained version went live" in shown
    console = Console(width=120)
    with console.capture() as printed:
        console.print(simulation_figures.make_table(rows))
    assert f"{rows[-1].served_utility:+.2f} (" in printed.get()
    assert f"{rows[-1].utility:+.2f} (" in printed.get()
    simulation_figures.plot(play, tmp_path / "curve.png", "test")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


async def test_without_a_head_served_answers_are_the_single_ones(talk):
    """The control of the test above."""
    talk.dialogue.sampler.selector = None
    play = talk.make_simulation()
    rows = await play.run(1, MESSAGES, 1, lambda row: None)
    assert {(row.candidates, row.served_utility - row.utility, row.served_gain) for row in rows} == {(1, 0.0, 0.0)}
    assert simulation_figures.compute_figures(play, "toy")["first_choice_reactions"] is None
    assert simulation_figures.describe_changes(play).startswith("the reward head never chose among several answers")
    assert not [line for line in talk.told if line.startswith("after")]


async def test_judging_leaves_the_head_as_it_is(talk, database):
    play = talk.make_simulation(selector=talk.selector)
    await play.run(1, MESSAGES, 1, lambda row: None)

    def read_head() -> object:
        found = talk.selector
        return found.head, found._rng.getstate(), list(found._usual), len(read_all(database, turns))

    before = read_head()
    single = await play.judge.ask("policy-0", 1)
    first = await play.judge.choose("policy-0", single)
    assert (await play.judge.choose("policy-0", single), read_head()) == (first, before)
    assert first.candidates > 1
    await talk.selector.choose(await talk.dialogue.policy.sample_replies((1, 2, 3), 8))  # the control
    assert read_head() != before


async def test_a_head_that_is_waited_for_knows_the_latest_reaction(talk):
    play = talk.make_simulation(selector=talk.selector)
    await play.run(1, MESSAGES, 1, lambda row: None)
    place = await talk.dialogue.open(Conversation(simulation.PLATFORM, channel=new_id()))
    turn = await talk.dialogue.respond(Message(place.id, "user-99", "hello"))
    await talk.dialogue.record_feedback(Feedback(turn.id, "user-99", FeedbackKind.APPROVAL))
    assert "user-99" not in talk.selector.head.teachers, "the check could not fail"
    await talk.selector.wait_until_current()
    assert "user-99" in talk.selector.head.teachers
