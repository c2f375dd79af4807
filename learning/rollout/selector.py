"""HeadSelector: chooses answers by a reward head, which it fits again after each reaction.

It holds one head in memory. Without evidence that the head is right it asks for one answer only. A tenth of the answers stay
plain samples. When chosen answers are liked less than plain ones, it stops choosing.
"""

import asyncio
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bot.memory.embedder import Embedder
from bot.serving.selection import SamplingPlan
from bot.store.forgetting import remove_heads
from bot.store.registry import PolicyRegistry
from bot.types import Candidate, Reply, Selection, Turn
from learning.data.experience import Experience
from learning.data.feature_space import AnswerText, FeatureExtractor
from learning.data.replay_buffer import ReplayBuffer
from learning.judging.best_of_n import (
    FEW_E_VALUE,
    LEAST_OF_A_KIND,
    LEAST_REACTIONS,
    MANY_E_VALUE,
    PLAIN_SHARE,
    compute_chances,
    count_candidates,
    is_harmful,
)
from learning.judging.taught_head import NEWEST, TaughtHead, count_approval, find_peak_e_value, fit_head
from learning.rollout.heads import locate_heads, save_head

USUAL = 512  # of the latest candidates tell what answers are usually like
PAUSE_SECONDS = 1.0  # between two looks whether learning is still paused


@dataclass(frozen=True)
class _State:
    """A head with what decides about its use; or `why` it is not used."""

    head: TaughtHead | None = None
    why: str = ""
    only_for: frozenset[str] = field(default_factory=frozenset)  # askers; everybody if it is empty
    people: Mapping[str, str] = field(default_factory=dict)  # whom an asker counts as


class HeadSelector:
    """A `bot.serving.selection.Selector`. `run` keeps its head up to date, except while learning is paused."""

    def __init__(self, buffer: ReplayBuffer, embedder: Embedder | None, seed: int):
        self._buffer = buffer
        self._extractor = FeatureExtractor(embedder)
        self._heads = locate_heads(buffer.config.data)
        self._rng = random.Random(seed)
        self._usual: deque[AnswerText] = deque(maxlen=USUAL)
        self._state = _State(why="the reward head is not fitted yet")
        self._is_outdated = asyncio.Event()
        self._peak = 0.0  # the highest e-value so far
        self._said: set[str] | None = None  # the ids of the feedback that the head was fitted to
        self._forgotten = 0  # times that something was forgotten
        self._is_current = asyncio.Event()

    @property
    def head(self) -> TaughtHead | None:
        """The head that chooses answers, or None."""
        return self._state.head

    def plan(self, asker_id: str, most: int) -> SamplingPlan:
        """Return how many answers to sample, from 1 to `most`."""
        state = self._state
        if state.head is None:
            return SamplingPlan(why=state.why)
        if state.only_for and asker_id not in state.only_for:
            return SamplingPlan(why="one person alone taught the reward head, so it chooses for that person only")
        count = count_candidates(state.head.find_e_value(state.people.get(asker_id, asker_id)), most)
        if count == 1:
            return SamplingPlan(why="the reward head is sure of other people's taste only")
        return SamplingPlan(is_plain=True) if self._rng.random() < PLAIN_SHARE else SamplingPlan(count)

    async def choose(self, replies: Sequence[Reply], rival: Turn | None = None, asker_id: str = "") -> Selection:
        """Choose one of the replies, the likelier the better the head's pessimistic score of it is, for the asker if given.

        Beside a `rival` that people compare with it, choose the one on which draws from the head's posterior disagree most.
        """
        head = self._state.head
        if head is None:  # it was forgotten meanwhile
            return Selection(candidates=[_describe(one) for one in replies], why=self._state.why)
        texts = [describe_text(one) for one in replies]
        raw = await asyncio.to_thread(self._extractor.extract, texts if rival is None else [*texts, describe_text(rival)])
        self._usual.extend(texts)
        raw, of_rival = raw[: len(texts)], raw[len(texts) :]
        person = self._state.people.get(asker_id, asker_id)
        scores = head.score(raw, person=person)
        doubts = scores if rival is None else head.compute_doubts(raw, of_rival, self._rng.randrange(2**32), person)
        chances = compute_chances(doubts)
        chosen = self._rng.choices(range(len(replies)), chances.tolist())[0]
        rows = zip(replies, scores, chances, head.space.place(raw), strict=True)
        candidates = [
            _describe(one).model_copy(
                update={
                    "score": float(score),
                    "chance": float(chance),
                    "features": dict(zip(head.space.names, np.round(place, 3).tolist(), strict=True)),
                }
            )
            for one, score, chance, place in rows
        ]
        return Selection(head=head.name, chosen=chosen, candidates=candidates, moved=head.explain(raw, chosen, person))

    def is_proven(self) -> bool:
        """Whether the head may choose from the most answers, and label others."""
        head = self._state.head
        return head is not None and head.peak_e_value >= MANY_E_VALUE

    def notice_feedback(self) -> None:
        """Have the head fitted again."""
        self._is_current.clear()
        self._is_outdated.set()

    async def wait_until_current(self) -> None:
        """Wait until the head is fitted to all feedback so far. While learning is paused, wait until it goes on."""
        await self._is_current.wait()

    async def run(self) -> None:
        """Fit the head now and after each reaction, forever."""
        self._is_outdated.set()
        while True:
            await self._is_outdated.wait()
            self._is_outdated.clear()
            if await self._buffer.store.database.call(self._is_paused):
                await self._stay_as_it_is()
            forgotten = self._forgotten
            rated = await self._buffer.store.database.call(self._buffer.read_rated, NEWEST)
            state = await asyncio.to_thread(self._fit_and_save, rated, list(self._usual))
            if forgotten == self._forgotten:
                self._state = state
            else:  # it was fitted to what was forgotten meanwhile
                self.forget()
            if not self._is_outdated.is_set():
                self._is_current.set()

    async def _stay_as_it_is(self) -> None:
        """Wait until learning goes on. Meanwhile drop the head as soon as the opinion of one of its teachers counts no more,
        for example because they withdrew their consent.
        """
        database = self._buffer.store.database
        self._is_outdated.set()  # for the first look
        while await database.call(self._is_paused):
            if self._is_outdated.is_set():
                self._is_outdated.clear()
                if self._state.head is None:
                    self._state = _State(why="learning is paused, so the reward head is not fitted")
                elif not await database.call(self._counts_each_teacher, self._state.head):
                    self._state = _State(why="learning is paused, and a teacher of the reward head counts no more")
            await asyncio.sleep(PAUSE_SECONDS)

    def _counts_each_teacher(self, head: TaughtHead) -> bool:
        rated = self._buffer.read_rated(NEWEST)
        return {*head.teachers} <= {person for one in rated for person in one.opinion_holders}

    def forget(self) -> None:
        """Drop all that was fitted to anybody's texts and reactions, also from the disk, and fit again."""
        self._forgotten += 1
        self._said = None
        self._state = _State(why="something was forgotten, and the reward head is fitted again")
        self._usual.clear()
        self._extractor.forget()
        remove_heads(self._heads)
        self.notice_feedback()

    def _is_paused(self) -> bool:
        return PolicyRegistry(self._buffer.store.database).is_learning_paused()

    def _fit_and_save(self, rated: Sequence[Experience], usual: Sequence[AnswerText]) -> _State:
        how = self._extractor, self._buffer.config.rewards.person_cap
        said = {one for experience in rated for one in experience.feedback_ids}
        is_known = self._said is not None and self._said <= said  # not at the start, nor when an opinion was taken back
        if not is_known and len(rated) < NEWEST:
            self._peak = find_peak_e_value(rated, *how)
        self._said = said
        head = fit_head(rated, usual, *how, self._peak)
        if head is None:
            needed = f"{LEAST_REACTIONS} reactions with {LEAST_OF_A_KIND} of each kind are needed"
            return _State(why=f"too few reactions for a reward head ({len(rated)}; {needed})")
        self._peak = head.peak_e_value
        if head.peak_e_value < FEW_E_VALUE and not head.own:
            return _State(why=f"the reward head is not sure (e-value {head.peak_e_value:.2g}, needed {FEW_E_VALUE:g})")
        chosen, plain = (count_approval(one for one in rated if one.is_selected == kind) for kind in (True, False))
        if is_harmful(chosen, plain):
            told = f"{chosen.liked} of {chosen.total}, against {plain.liked} of {plain.total}"
            return _State(why=f"chosen answers were liked less than plain ones ({told})")
        save_head(head, self._heads)
        return _State(
            head,
            only_for=frozenset(_find_circle(rated, head.teachers)),
            people={one.asker: one.asker_voice for one in rated},
        )


def describe_text(said: Reply | Turn) -> AnswerText:
    """Return an answer as the head sees it."""
    return AnswerText(said.text, said.finish_reason == "stop", _mean(said.logprobs or ()))


def _find_circle(rated: Sequence[Experience], teachers: Sequence[str]) -> set[str]:
    """Return whom a head serves that one person alone taught: that person. An empty set stands for everybody."""
    if len(teachers) != 1:
        return set()
    askers = {one.asker for one in rated}  # a web user's id differs from the id that the person counts as
    return {*teachers} | (askers if len(askers) == 1 else set())


def _describe(reply: Reply) -> Candidate:
    return Candidate(text=reply.text, is_finished=reply.finish_reason == "stop", mean_logprob=_mean(reply.logprobs))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
