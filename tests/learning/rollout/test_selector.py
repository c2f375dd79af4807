"""The reward head in a running kibitz: when it may choose, what it chooses, and whom it forgets."""

import asyncio
import contextlib
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from conftest import answered, react, until

from bot.memory.caches import Caches
from bot.memory.recall import Recall, load_retrieval_weights
from bot.memory.scope import Memory
from bot.serving.selection import SamplingPlan
from bot.store.erasures import Erasures
from bot.store.forgetting import forget_message, forget_person
from bot.store.registry import BASE
from bot.store.users import Users
from bot.supervision import Health, supervise
from bot.types import Candidate, Conversation, Feedback, Reply, SamplingParams, Selection, Turn, new_id, now
from learning.data.replay_buffer import ReplayBuffer
from learning.judging.best_of_n import FEW, MANY
from learning.judging.taught_head import fit_head
from learning.models import toy
from learning.rollout import selector as selector_module
from learning.rollout.heads import locate_heads, read_head
from learning.rollout.selector import HeadSelector

PEOPLE = ("ann", "bob", "cleo", "dora")
SEVERAL = Selection(head="head-1", candidates=[Candidate(text="Hey!"), Candidate(text="Hi!")])


@dataclass
class Stage:
    """A selector on a real store, with the answers that people judged."""

    selector: HeadSelector
    store: object
    tokenizer: object

    def judge(
        self, count: int, people=PEOPLE, *, contrary=(), seed=0, is_by_lot=False, **details
    ) -> list[tuple[Turn, Feedback]]:
        """Let people judge answers. They like those with an emoji (contrary ones: without), or react by lot."""
        rng = random.Random(seed)
        found = []
        for number in range(count):
            style = rng.choice(toy.STYLES)
            prompt, intent = rng.choice(toy.list_prompts())
            person = people[number % len(people)]
            answer = toy.compose_answer(intent, style)
            turn = answered(self.store, self.tokenizer, f"{prompt} {number}", answer, author=person, **details)
            likes = rng.random() < 0.5 if is_by_lot else style.emoji != (person in contrary)
            found.append((turn, react(self.store, turn, likes, person)))
        return found

    async def fit(self) -> SamplingPlan:
        """Have the head fitted to all reactions. Return a plan that is no plain sample."""
        before = self.selector._state
        task = asyncio.create_task(self.selector.run())
        try:
            await until(lambda: self.selector._state is not before or task.done())
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return self.plan()

    def plan(self, asker: str = "ann", most: int = MANY) -> SamplingPlan:
        plans = (self.selector.plan(asker, most) for _ in range(100))
        return next(one for one in plans if not one.is_plain)

    @property
    def files(self) -> list[str]:
        """What the files of heads hold."""
        return [file.read_text() for file in locate_heads(self.selector._buffer.config.data).glob("*")]


@pytest.fixture
def stage(config, store, registry, tokenizer) -> Stage:
    return Stage(HeadSelector(ReplayBuffer(store, tokenizer, config), None, seed=0), store, tokenizer)


def reply(text: str, logprob: float = -0.5) -> Reply:
    return Reply(text, BASE, (1,), (2,), (logprob,), "stop", SamplingParams(), 1.0)


async def test_enough_reactions_of_one_taste_let_it_choose_and_as_many_by_lot_do_not(stage):
    assert stage.plan() == SamplingPlan(why="the reward head is not fitted yet")
    stage.judge(8)
    told = "too few reactions for a reward head (8; 12 reactions with 3 of each kind are needed)"
    assert await stage.fit() == SamplingPlan(why=told)
    stage.judge(24, seed=1)
    assert await stage.fit() == SamplingPlan(MANY)
    assert stage.plan(most=FEW) == SamplingPlan(FEW)
    assert [read_head(file).name for file in stage.selector._heads.iterdir()] == [stage.selector._state.head.name]


async def test_reactions_by_lot_let_it_choose_nothing(stage):
    stage.judge(32, is_by_lot=True)
    plan = await stage.fit()
    assert plan.count == 1
    assert plan.why.startswith("the reward head is not sure (e-value ")
    assert stage.files == [], "only a head that chooses is kept"


async def test_people_of_opposite_tastes_are_each_given_what_they_like(stage):
    stage.judge(64, people=("ann", "bob"), contrary=("bob",))
    await stage.fit()
    plans = {person: stage.plan(person) for person in ("ann", "bob", "cleo")}
    assert plans["ann"].count == plans["bob"].count == MANY
    assert plans["cleo"] == SamplingPlan(why="the reward head is sure of other people's taste only")
    replies = [reply("Hey there!"), reply("Hey there! 👋")]
    for person, wanted in (("ann", 1), ("bob", 0)):
        found = [(await stage.selector.choose(replies, asker_id=person)).chosen for _ in range(40)]
        assert np.mean(np.array(found) == wanted) > 0.9


async def test_a_web_user_has_a_taste_of_their_own_and_who_asks_has_not_that_of_who_judges(stage):
    stage.judge(24, people=("ann",), contrary=("ann",))
    stage.judge(96, people=("bob", "cleo", "dora"))
    place = stage.store.open_conversation(Conversation("web", new_id(), space="app"))
    stage.judge(24, people=("app/cleo",), contrary=("app/cleo",), place=place)
    for number in range(8):  # zed asks in a room where only ann judges
        room = stage.store.open_conversation(Conversation("test", new_id()))
        turn = answered(stage.store, stage.tokenizer, f"zed {number}", "Hey!", author="zed", place=room)
        answered(stage.store, stage.tokenizer, "here", "Hey!", author="ann", place=room)
        react(stage.store, turn, True, "ann")
    await stage.fit()
    assert {"ann", "app"} <= {*stage.selector.head.own}
    replies = [reply("Hey there!"), reply("Hey there! 👋")]
    everybody = (await stage.selector.choose(replies)).candidates
    for person, prefers_emoji in (("ann", False), ("app/cleo", False), ("bob", True)):
        scores = [one.score for one in (await stage.selector.choose(replies, asker_id=person)).candidates]
        assert (scores[1] > scores[0]) == prefers_emoji
    zed = (await stage.selector.choose(replies, asker_id="zed")).candidates
    assert [one.score for one in zed] == [one.score for one in everybody]


async def test_a_tenth_of_the_answers_stays_plain(stage):
    stage.judge(32)
    assert not stage.selector.plan("ann", MANY).is_plain, "not before it is sure"
    await stage.fit()
    plans = Counter(stage.selector.plan("ann", MANY) for _ in range(1000))
    assert set(plans) == {SamplingPlan(is_plain=True), SamplingPlan(MANY)}
    assert plans[SamplingPlan(is_plain=True)] == pytest.approx(100, abs=30)


async def test_what_people_like_is_chosen_and_all_that_it_was_chosen_from_is_told(stage):
    stage.judge(32)
    await stage.fit()
    texts = ["Hey there!", "Hey there! 👋", "Good evening.", "Hey there!"]
    found = [await stage.selector.choose([reply(text) for text in texts]) for _ in range(40)]
    one = found[0]
    assert np.mean([selection.chosen == 1 for selection in found]) > 0.9
    assert [candidate.text for candidate in one.candidates] == texts
    assert sum(candidate.chance for candidate in one.candidates) == pytest.approx(1)
    assert one.candidates[0].chance == pytest.approx(one.candidates[3].chance), "the same text"
    assert max(one.candidates, key=lambda candidate: candidate.score).text == texts[1]
    assert one.candidates[1].features["emoji"] > one.candidates[0].features["emoji"]
    assert len({frozenset(candidate.features) for candidate in one.candidates}) == 1
    assert one.is_selected
    assert one.head == stage.selector._state.head.name
    chosen = next(selection for selection in found if selection.chosen == 1)
    assert next(iter(chosen.moved)) == "emoji"
    assert chosen.moved["emoji"] > 0
    assert chosen.candidates[1].mean_logprob == -0.5
    assert Selection.from_json(one.as_json()) == one


async def test_a_choice_without_log_probabilities_or_between_equal_answers_is_one_too(stage):
    stage.judge(32)
    await stage.fit()
    replies = [Reply("Hey! 👋", BASE, (1,), (), (), "length", SamplingParams(), 1.0)] * 4
    found = [await stage.selector.choose(replies) for _ in range(80)]
    assert {candidate.chance for one in found for candidate in one.candidates} == {0.25}
    assert {one.chosen for one in found} == {0, 1, 2, 3}
    assert {(one.mean_logprob, one.is_finished) for one in found[0].candidates} == {(None, False)}
    assert found[0].moved == {}


async def test_a_new_reaction_has_the_head_fitted_again(stage):
    stage.judge(32)
    task = asyncio.create_task(stage.selector.run())
    await until(lambda: stage.selector._state.head)
    first = stage.selector._state.head
    stage.judge(4, seed=2)
    await asyncio.sleep(0.1)
    assert stage.selector._state.head is first, "the control: it was not told"
    stage.selector.notice_feedback()
    await until(lambda: stage.selector._state.head is not first)
    task.cancel()
    assert stage.selector._state.head.name != first.name


def make_caches(stage: Stage) -> Caches:
    database = stage.store.database
    recall = Recall(Memory(database), None, load_retrieval_weights())
    return Caches(Erasures(database.directory), recall, stage.tokenizer, [stage.selector.forget])


@pytest.mark.parametrize("what", ["person", "message"])
async def test_what_is_forgotten_is_in_no_head_and_the_next_one_is_fitted_without_it(stage, registry, what):
    said = stage.judge(48)
    caches, database = make_caches(stage), stage.store.database
    assert (await stage.fit()).count == MANY
    assert '"ann"' in stage.files[0], "the control"
    before = stage.selector._state.head
    assert before.teachers == PEOPLE
    if what == "person":
        await database.call(forget_person, database, registry, "test", "ann")
    else:
        await database.call(forget_message, database, said[0][0].message_id)
    assert stage.files == [], "also while no kibitz runs"
    await caches.drop_forgotten()
    assert stage.plan() == SamplingPlan(why="something was forgotten, and the reward head is fitted again")
    assert stage.selector._extractor._known == {}
    assert not stage.selector._usual
    none = await stage.selector.choose([reply("Hey!"), reply("Hey! 👋")])
    assert (none.chosen, none.head, [one.chance for one in none.candidates]) == (0, "", [0.0, 0.0])
    assert (await stage.fit()).count == MANY
    after = stage.selector._state.head
    assert after.name != before.name
    assert after.teachers == (PEOPLE[1:] if what == "person" else PEOPLE)
    assert len(stage.files) == 1
    assert ('"ann"' in stage.files[0]) == (what == "message")
    known = stage.selector._extractor._known
    assert said[1][0].text in known, "the control"
    gone = {turn.text for turn, given in said if given.user_id == "ann"} - {
        turn.text for turn, given in said if given.user_id != "ann"
    }
    assert bool(gone & set(known)) == (what == "message")


async def test_what_is_forgotten_while_the_head_is_fitted_is_not_kept(stage, registry, monkeypatch):
    stage.judge(48)
    caches, database, loop = make_caches(stage), stage.store.database, asyncio.get_running_loop()
    fitted = []

    async def forget() -> None:
        await database.call(forget_person, database, registry, "test", "ann")
        await caches.drop_forgotten()

    def fit_while_somebody_is_forgotten(*given):
        if not fitted:
            asyncio.run_coroutine_threadsafe(forget(), loop).result(60)
        found = fit_head(*given)
        fitted.append(found)
        return found

    monkeypatch.setattr(selector_module, "fit_head", fit_while_somebody_is_forgotten)
    task = asyncio.create_task(stage.selector.run())
    await until(lambda: stage.selector._state.head)
    task.cancel()
    assert [("ann" in one.teachers) for one in fitted] == [True, False]
    assert stage.selector._state.head is fitted[1]
    assert len(stage.files) == 1
    assert '"ann"' not in stage.files[0]


async def test_retracted_reactions_and_people_without_consent_do_not_count(stage, config):
    said = stage.judge(32)
    assert (await stage.fit()).count == MANY, "the control"
    for turn, given in said:
        if given.user_id in ("ann", "bob"):
            stage.store.add_feedback(Feedback(turn.id, given.user_id, given.kind, given.signal, retracts=True))
    assert (await stage.fit()).count > 1
    assert stage.selector._state.head.teachers == ("cleo", "dora")
    Users(stage.store.database, config.privacy).record_consent("test", "cleo", consent=False)
    assert (await stage.fit()).why.startswith("too few reactions for a reward head (8; ")
    Users(stage.store.database, config.privacy).record_consent("test", "cleo", consent=True)
    assert (await stage.fit()).count > 1


@pytest.mark.parametrize("place", [None, Conversation("web", "chat", space="app")], ids=["a platform", "the web"])
async def test_a_head_that_one_person_alone_taught_chooses_for_them_alone(stage, place):
    person = "ann" if place is None else "app/ann"
    told = {} if place is None else {"place": stage.store.open_conversation(place)}
    stage.judge(32, [person], **told)
    await stage.fit()
    assert stage.plan(person).count == MANY
    alone = SamplingPlan(why="one person alone taught the reward head, so it chooses for that person only")
    assert stage.plan("bob") == alone
    stage.judge(4, ["bob"], seed=5)
    await stage.fit()
    assert stage.plan("bob").count == stage.plan("cleo").count == MANY, "the control"


@pytest.mark.parametrize("is_liked", [False, True], ids=["disliked", "the control"])
async def test_chosen_answers_that_people_like_less_than_plain_ones_are_chosen_no_more(stage, is_liked):
    stage.judge(40)
    for number, person in enumerate(PEOPLE * 4):
        text = "Hey there! 👋" if is_liked else "Good evening."
        turn = answered(stage.store, stage.tokenizer, f"hello {number}", text, author=person, selection=SEVERAL)
        react(stage.store, turn, is_liked, person)
    plan = await stage.fit()
    if is_liked:
        assert plan.count == MANY
    else:
        assert plan.count == 1
        assert plan.why.startswith("chosen answers were liked less than plain ones (0 of 16, against ")


async def test_a_pause_of_learning_keeps_the_head_as_it_is_and_its_end_has_it_fitted_again(stage, registry, monkeypatch):
    monkeypatch.setattr(selector_module, "PAUSE_SECONDS", 0.01)
    stage.judge(32)
    registry.toggle_learning()
    task = asyncio.create_task(stage.selector.run())
    await until(lambda: stage.plan().why == "learning is paused, so the reward head is not fitted")
    registry.toggle_learning()
    await until(lambda: stage.selector._state.head)
    first = stage.selector._state.head
    registry.toggle_learning()
    stage.judge(4, seed=2)
    stage.selector.notice_feedback()
    await asyncio.sleep(0.2)
    assert stage.selector._state.head is first
    assert stage.plan().count == MANY, "it goes on choosing"
    registry.toggle_learning()
    await until(lambda: stage.selector._state.head is not first)
    task.cancel()


@pytest.mark.parametrize("withdraws", [True, False], ids=["withdrawn", "the control"])
async def test_a_teacher_who_withdraws_while_learning_is_paused_teaches_no_more(
    stage, registry, monkeypatch, config, withdraws
):
    monkeypatch.setattr(selector_module, "PAUSE_SECONDS", 0.01)
    stage.judge(32)
    task = asyncio.create_task(stage.selector.run())
    await until(lambda: stage.selector.head)
    assert "cleo" in stage.selector.head.teachers
    registry.toggle_learning()
    Users(stage.store.database, config.privacy).record_consent("test", "cleo", consent=not withdraws)
    stage.selector.notice_feedback()
    if withdraws:
        await until(lambda: stage.selector.head is None)
        assert stage.plan().why == "learning is paused, and a teacher of the reward head counts no more"
        registry.toggle_learning()
        await until(lambda: stage.selector.head)
        assert "cleo" not in stage.selector.head.teachers
    else:
        await asyncio.sleep(0.2)
        assert stage.plan().count == MANY
    task.cancel()


@contextlib.asynccontextmanager
async def supervised(stage: Stage) -> AsyncIterator[Health]:
    health = Health([].append)
    task = asyncio.create_task(supervise("reward head", stage.selector.run, health))
    yield health
    task.cancel()


@pytest.mark.parametrize("failing", ["fit_head", "save_head"])
async def test_if_fitting_fails_answers_are_single_and_it_is_tried_until_it_works(stage, monkeypatch, failing):
    monkeypatch.setattr("bot.supervision.FIRST_PAUSE", 0.01)
    monkeypatch.setattr("bot.supervision.LONGEST_PAUSE", 0.01)
    stage.judge(32)
    with monkeypatch.context() as broken:
        broken.setattr(selector_module, failing, lambda *_: 1 / 0)
        async with supervised(stage) as health:
            await until(lambda: "reward head" in health.failures)
            assert stage.plan() == SamplingPlan(why="the reward head is not fitted yet")
            broken.undo()
            await until(lambda: stage.selector._state.head)
            assert stage.plan().count == MANY


async def test_choices_and_fits_at_the_same_time_do_not_disturb_each_other(stage):
    stage.judge(32)
    await stage.fit()
    stage.selector._extractor._size = 3
    stop = threading.Event()

    def forget_all_the_time() -> None:
        while not stop.is_set():
            stage.selector._extractor.forget()

    other = threading.Thread(target=forget_all_the_time)
    other.start()
    try:
        replies = [reply(f"Hey {number}!") for number in range(8)]
        found = await asyncio.gather(*(stage.selector.choose(replies) for _ in range(40)), stage.fit())
    finally:
        stop.set()
        other.join()
    assert all(one.is_selected for one in found[:-1])


async def test_beside_a_rival_the_answer_is_chosen_that_the_comparison_tells_most_about(stage):
    [(rival, _), *_] = stage.judge(32)
    await stage.fit()
    rival = replace(rival, text="Hey there!")
    # Sure to be better, sure to be as good, and anybody's guess: nobody judged a list.
    replies = [reply("Hey there! 👋"), reply("Hey there!", -0.5), reply("- Hey\n- there!")]
    found = [await stage.selector.choose(replies, rival) for _ in range(40)]
    assert np.mean([one.chosen == 2 for one in found]) > 0.6
    assert sum(candidate.chance for candidate in found[0].candidates) == pytest.approx(1)
    alone = [await stage.selector.choose(replies) for _ in range(40)]
    assert np.mean([one.chosen == 0 for one in alone]) > 0.9, "the control"


async def test_what_was_proven_goes_on_choosing_until_those_reactions_are_taken_back(stage):
    proof = stage.judge(32)
    assert await stage.fit() == SamplingPlan(MANY)
    stage.judge(80, seed=1, is_by_lot=True)
    assert await stage.fit() == SamplingPlan(MANY)
    head = stage.selector.head
    assert head.head.e_value < head.peak_e_value, "the control: it proves less by now"
    for _, given in proof:
        stage.store.add_feedback(replace(given, id=new_id(), event_id=None, at=now(), retracts=True))
    assert (await stage.fit()).why.startswith("the reward head is not sure (e-value ")
