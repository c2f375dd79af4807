"""The same life on every platform: what people did is what the database says in the end.

A random walk of people who write, react, take back, ask again, pick, edit and delete, on several places at once, with the
process restarted in the middle while they go on; beside it a model of what that must come to.
"""

import asyncio
import contextlib
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from conftest import shared, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bot.chat.dialogue import MAX_MESSAGE_CHARACTERS, render_answer
from bot.store.feedback import not_retracted, select_effective
from bot.store.picks import PICK
from bot.types import FeedbackKind, Turn
from connectors.local.benchmark import wait_for_answers
from connectors.local.platforms import PEOPLE, PLATFORMS, DiscordPlatform, Platform, SeenAnswer, SlackPlatform, WebPlatform
from learning.data.rewards import compute_reward

OPINION = {FeedbackKind.APPROVAL: True, FeedbackKind.DISAPPROVAL: False}
WORDS = ["hello", "i can't sleep", "good night", "tell me a joke", "what should i eat"]


@dataclass
class Answer:
    """What must be so of an answer."""

    id: str
    opinions: dict[str, bool] = field(default_factory=dict)  # person -> likes
    unwanted: set[str] = field(default_factory=set)  # who asked again
    picks: dict[str, bool] = field(default_factory=dict)  # person -> whether they find it better than the one before


@dataclass
class Question:
    """What a person wrote, as it stands now, and what became of it."""

    id: str
    user: str
    text: str
    answers: list[Answer] = field(default_factory=list)
    deleted: bool = False


class Life:
    """What happens in one place: draws what is next, does it on the platform, and notes what it must come to."""

    def __init__(self, platform: Platform, direct: bool, seed: str):
        self.platform, self.place, self.rng = platform, platform.place(direct), random.Random(seed)
        self.picking, self.presses = random.Random(f"picks {seed}"), 0
        self.questions: list[Question] = []
        self.seen: set[str] = set()

    def alive(self) -> list[Question]:
        return [one for one in self.questions if not one.deleted]

    def anybody(self) -> str:
        return self.rng.choice(sorted(PEOPLE))

    def shown(self, answer: Answer) -> SeenAnswer:
        return next(one for one in self.platform.answers(self.place) if one.id == answer.id)

    async def step(self) -> None:
        await self.rng.choice([self.say, self.react, self.react, self.react, self.again, self.edit, self.delete])()
        await self.pick()

    async def say(self) -> None:
        await self.ask()
        await self.answered()

    async def ask(self) -> None:
        user, text = self.anybody(), self.rng.choice(WORDS)
        self.questions.append(Question(await self.platform.say(self.place, user, text), user, text))

    async def answered(self) -> None:
        """The last question has one more answer."""
        for one in await wait_for_answers(self.platform, self.place, len(self.seen) + 1):
            if one.id not in self.seen:
                self.questions[-1].answers.append(Answer(one.id))
                self.seen.add(one.id)

    async def react(self) -> None:
        answers = [answer for question in self.alive() for answer in question.answers]
        if not answers:
            return
        answer, user = self.rng.choice(answers), self.anybody()
        if user in answer.opinions:
            await self.platform.take_back(user, self.shown(answer), answer.opinions.pop(user))
        if self.rng.random() < 0.8:
            answer.opinions[user] = self.rng.random() < 0.5
            await self.platform.react(user, self.shown(answer), answer.opinions[user])

    async def again(self) -> None:
        if self.questions and not self.questions[-1].deleted:
            user, last = self.anybody(), self.questions[-1].answers[-1]
            last.unwanted.add(user)
            await self.platform.regenerate(user, self.shown(last))
            await self.answered()

    async def pick(self) -> None:
        """Somebody says whether a second answer is better, thinks otherwise, or takes that back, if there is one."""
        user = self.picking.choice(sorted(PEOPLE))
        second = [
            answer
            for question in self.alive()
            for answer in question.answers[1:]
            if user in answer.picks or not any(user in one.picks for one in question.answers)  # in one pair of a question
        ]
        if second:
            answer, prefers_new = self.picking.choice(second), self.picking.random() < 0.5
            self.presses += 1
            if answer.picks.get(user) is prefers_new:
                del answer.picks[user]
                await self.platform.take_pick_back(user, self.shown(answer), prefers_new)
            else:
                answer.picks[user] = prefers_new
                await self.platform.pick(user, self.shown(answer), prefers_new)

    async def edit(self) -> None:
        if self.platform.name != "web" and self.questions and not self.questions[-1].deleted:
            question = self.questions[-1]
            if len(question.answers) == 1:  # all later ones are to the edited question
                question.text = f"{self.rng.choice(WORDS)} {self.rng.random():.6f}"
                await self.platform.edit(self.place, question.id, question.text)
                await self.say()

    async def change_of_mind(self) -> None:
        """The last question is changed or deleted, and nothing is said after it."""
        question = self.questions[-1]
        if self.platform.name == "web" or question.deleted:
            return
        if len(question.answers) == 1 and self.rng.random() < 0.5:
            question.text = f"{self.rng.choice(WORDS)} {self.rng.random():.6f}"
            await self.platform.edit(self.place, question.id, question.text)
        else:
            await self.delete()

    async def delete(self) -> None:
        if self.questions and not self.questions[-1].deleted:  # what came after it would go with it: it was shown
            self.questions[-1].deleted = True
            await self.platform.delete(self.place, self.questions[-1].id)

    async def fits(self, live) -> None:
        """The database says what people did."""
        call, store = live.database.call, live.store
        assert len(self.platform.answers(self.place)) == len(self.seen)
        for question in self.questions:
            picked: dict[str, dict[str, bool]] = defaultdict(dict)  # turn -> person -> whether they find it the better one
            expected: dict[str, dict[str, bool]] = defaultdict(dict)
            for answer in question.answers:
                turn_id = await self.platform.find_turn_id(self.shown(answer))
                turn = await call(store.find_turn, turn_id)
                if question.deleted:
                    assert turn is None
                    continue
                assert turn is not None
                assert render_answer(turn).strip() == self.shown(answer).text.strip()
                assert (await call(store.read_message, turn.message_id)).text == question.text
                assert name_of(self.platform, turn.asker_id) == question.user
                everything = (await call(store.read_feedback_on, [turn_id])).get(turn_id, [])
                for row in not_retracted(everything):
                    if row.signal == PICK:
                        assert name_of(self.platform, row.user_id) not in picked[turn_id]  # not both
                        picked[turn_id][name_of(self.platform, row.user_id)] = OPINION[row.kind]
                for user, prefers_new in answer.picks.items():
                    expected[turn_id][user], expected[turn.replaces or ""][user] = prefers_new, not prefers_new
                said = select_effective(row for row in everything if row.signal != PICK)
                rows = [(name_of(self.platform, row.user_id), row.kind) for row in said]
                assert {user: OPINION[kind] for user, kind in rows if kind in OPINION} == answer.opinions
                assert {user for user, kind in rows if kind == FeedbackKind.REGENERATE} == answer.unwanted
            assert picked == expected

    async def eventually_fits(self, live) -> None:
        for _ in range(3000):
            with contextlib.suppress(AssertionError):
                return await self.fits(live)
            await asyncio.sleep(0.1)
        return await self.fits(live)


async def stored(live, platform: Platform, answer: SeenAnswer) -> Turn:
    """The turn of an answer, as soon as it is stored: people see it a moment before."""
    async with asyncio.timeout(300):
        while (turn := await live.database.call(live.store.find_turn, await platform.find_turn_id(answer))) is None:
            await asyncio.sleep(0.02)
    return turn


def name_of(platform: Platform, user_id: str) -> str:
    """Who somebody is in the model."""
    if platform.name == "discord":
        return next(name for name, number in PEOPLE.items() if str(number) == user_id)
    return user_id.rpartition("/")[2].lower()


@pytest.mark.parametrize("name", sorted(PLATFORMS))
async def test_what_people_did_is_what_the_database_says_also_after_a_restart(live, name):
    platform = PLATFORMS[name](shared(live))
    await platform.start()
    lives = [Life(platform, direct, f"{name} {direct}") for direct in (True, False, False)]

    async def everywhere(act: Callable[[Life], Awaitable[None]]) -> None:
        await asyncio.gather(*(act(life) for life in lives))

    async def go_on(life: Life) -> None:
        for _ in range(12):
            await life.step()

    async def meanwhile() -> None:
        for act in (Life.react, Life.react, Life.change_of_mind, Life.ask):
            await everywhere(act)

    await everywhere(Life.say)
    for _ in range(2):
        await everywhere(go_on)
        await everywhere(lambda life: life.eventually_fits(live))
        await platform.restart(meanwhile)
        await everywhere(Life.answered)
        await everywhere(lambda life: life.eventually_fits(live))
    assert sum(life.presses for life in lives) > 0, "nobody picked"
    last = lives[0].questions[-1].answers[-1]
    last.opinions["ann"] = not last.opinions.get("ann", False)
    with pytest.raises(AssertionError):
        await lives[0].fits(live)  # the control: one opinion that nobody gave is noticed
    await platform.stop()


@pytest.mark.parametrize("name", sorted(PLATFORMS))
async def test_a_pick_after_a_regeneration_is_two_acts_on_every_platform(live, name):
    platform = PLATFORMS[name](shared(live))
    await platform.start()
    place = platform.place(direct=True)
    await platform.say(place, "ann", "hello")
    [first] = await wait_for_answers(platform, place, 1)
    await platform.regenerate("ann", first)
    answers = await wait_for_answers(platform, place, 2)
    second = next(one for one in answers if one.id != first.id)
    turns = [await stored(live, platform, one) for one in (first, second)]

    async def stands(*expected: set[FeedbackKind]) -> None:
        """What Ann said and did not take back comes to this, on the first and on the second answer."""

        def found() -> tuple[set[FeedbackKind], ...]:
            said = live.store.read_feedback_on([turn.id for turn in turns])
            return tuple({row.kind for row in not_retracted(said.get(turn.id, []))} for turn in turns)

        await until(lambda: found() == expected)

    again = FeedbackKind.REGENERATE
    assert turns[1].replaces == turns[0].id
    await stands({again}, set())
    await platform.pick("ann", second, prefers_new=True)
    await stands({again, FeedbackKind.DISAPPROVAL}, {FeedbackKind.APPROVAL})
    acts = [row for rows in live.store.read_feedback_on([turn.id for turn in turns]).values() for row in rows]
    assert [(row.signal, name_of(platform, row.user_id)) for row in acts if row.kind != again] == [(PICK, "ann")] * 2
    await platform.pick("ann", second, prefers_new=False)
    await stands({again, FeedbackKind.APPROVAL}, {FeedbackKind.DISAPPROVAL})
    reward = compute_reward(live.store.read_feedback_on([turns[0].id])[turns[0].id], turns[0].asker_id, live.config.rewards)
    assert reward.value == 0.5, "the first was better after all"
    await platform.take_pick_back("ann", second, prefers_new=False)
    await stands({again}, set())  # the control
    await platform.stop()


STRANGE = {
    "a lone surrogate": "\ud800 lone",
    "NUL": "nul \0 byte",
    "right to left": "\u202eright to left",
    "zalgo": "z" + "\u0301" * 5000,
    "300 emoji": "👍" * 300,
    "Markdown": "[" * 20_000,
    "1 MB": "x" * 1_000_000,
}


@pytest.mark.parametrize("make", [DiscordPlatform, SlackPlatform])
async def test_texts_of_every_kind_are_answered_at_bounded_cost(live, make):
    platform = make(shared(live))
    await platform.start()
    places = {name: platform.place(direct=True) for name in STRANGE}
    for name, text in STRANGE.items():
        await platform.say(places[name], "ann", text)
    for name, place in places.items():
        [answer] = await wait_for_answers(platform, place, 1)
        turn = await stored(live, platform, answer)
        assert 0 < len(turn.prompt_ids) <= live.config.policy.context_tokens, name
        assert len(live.store.read_message(turn.message_id).text) <= MAX_MESSAGE_CHARACTERS
    assert platform.fake.refused == []  # what came back was fit for the platform too
    await platform.stop()


MOVES = st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from([True, False])), max_size=8)


@pytest.mark.parametrize("make", [DiscordPlatform, SlackPlatform, WebPlatform])
async def test_any_sequence_of_reactions_ends_in_what_the_platform_shows(live, make):
    platform = make(shared(live))
    await platform.start()

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(moves=MOVES)
    async def holds(moves: list[tuple[str, bool]]) -> None:
        place = platform.place(direct=True)
        await platform.say(place, "ann", "hello")
        [answer] = await wait_for_answers(platform, place, 1)
        shown: dict[str, list[bool]] = defaultdict(list)
        for user, likes in moves:  # a person clicks: what is there goes, what is not there comes
            if likes in shown[user]:
                shown[user].remove(likes)
                await platform.take_back(user, answer, likes)
            else:
                shown[user].append(likes)
                await platform.react(user, answer, likes)
        turn_id = (await stored(live, platform, answer)).id
        expected = {user: opinions[-1] for user, opinions in shown.items() if opinions}
        found: dict[str, bool] = {}

        def as_shown() -> bool:
            rows = select_effective(live.store.read_feedback_on([turn_id]).get(turn_id, []))
            found.clear()
            found.update({name_of(platform, row.user_id): OPINION[row.kind] for row in rows})
            return found == expected

        await until(as_shown)

    await run_hypothesis(holds)
    await platform.stop()


async def run_hypothesis(test) -> None:
    """Hypothesis calls a function; ours is a coroutine in the loop that runs already."""
    loop = asyncio.get_running_loop()
    inner = test.hypothesis.inner_test
    test.hypothesis.inner_test = lambda **drawn: asyncio.run_coroutine_threadsafe(inner(**drawn), loop).result(600)
    await asyncio.to_thread(test)
