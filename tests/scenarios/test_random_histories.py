"""Random histories, in which the ten laws are checked after each step.

People talk, judge, edit, delete, withhold consent and are forgotten; versions are trained, go live and are rolled back;
kibitz is restarted, or loses its database for a moment; all of it in any order.

All of kibitz but vLLM and the optimisation is the real code; `one_weight` is what learns. `pytest --histories N` tries more.
Every message has a word of its own, and the policy repeats all the words that it was shown: so a word tells where it went.
"""

import asyncio
import contextlib
import copy
import json
import re
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field, replace
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa
from conftest import answered, react
from fake_vllm import FakeVllm
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from one_weight import EXCLAIMS, STATES, learn_in_an_instant

from bot import app
from bot.config import Config, load
from bot.errors import DatabaseUnavailable, NothingToLearn, RegistryError
from bot.models.tokenizer import ChatTokenizer
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.rebuild import DUE
from bot.store.registry import BASE, PolicyRegistry
from bot.store.tables import run_feedback, runs, switches
from bot.supervision import supervise
from bot.types import Conversation, Feedback, FeedbackKind, Message, PolicyState, Turn
from learning.data.replay_buffer import ReplayBuffer
from learning.judging import statistics
from learning.judging.error_budget import compute_next_level
from learning.judging.gate import judge
from learning.judging.metrics import EvidenceMetrics
from learning.judging.waiting import judge_waiting
from learning.models.version_files import fingerprint
from learning.rollout.deployment import Deployment
from learning.training.run import train_version

HISTORIES, STEPS = 200, 10
# How many turns others had said before, and whether a version is live: enough to judge one by, or so few that it waits.
SAID_BEFORE = [(32, False), (6, False), (32, True)]
WORD = re.compile(r"zq\d+x")
PLACES = [Conversation("test", channel, "space") for channel in ("one", "two", "direct")]
Result = TypeVar("Result")

PEOPLE = ["ann", "bob", "cat"]
people = st.sampled_from(PEOPLE)
places = st.integers(0, len(PLACES) - 1)
which = st.integers(0, 5)  # of what was said or answered, counted from the newest


@dataclass
class Said:
    """A message: all the words that it ever had, the newest last."""

    event: str
    person: str
    place: int
    words: list[str]
    message_id: str = ""
    is_gone: bool = False


@dataclass(frozen=True)
class Asked:
    """What had been said, thought and learned when somebody asked to be forgotten and the database refused it."""

    said: int
    feedback: frozenset[str]
    versions: frozenset[str]


@dataclass
class Ledger:
    """What people did, as the test knows it, and what kibitz told them."""

    said: list[Said] = field(default_factory=list)
    turns: dict[str, Turn] = field(default_factory=dict)  # those that must be as they were given
    feedback: dict[str, Feedback] = field(default_factory=dict)
    consent: dict[str, bool] = field(default_factory=dict)
    forgotten: set[str] = field(default_factory=set)  # words
    noted: dict[str, Asked] = field(default_factory=dict)  # by person: the next start makes it good
    decided_since: set[str] = field(default_factory=set)  # people, since it was noted
    runs: dict[str, set[str]] = field(default_factory=dict)  # by version: who taught it
    forgotten_teachers: set[str] = field(default_factory=set)  # versions
    versions: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    were_live: set[str] = field(default_factory=lambda: {BASE})
    judged: set[str] = field(default_factory=set)
    channels: dict[str, str] = field(default_factory=dict)  # by conversation
    count: int = 0
    acts: int = 0

    def new_act(self) -> int:
        self.acts += 1
        return self.acts

    def new_word(self) -> str:
        self.count += 1
        return f"zq{self.count}x"

    def author(self, word: str) -> Said:
        return next(one for one in self.said if word in one.words)


class Stage:
    """What all histories share: an event loop, a vLLM that repeats what it is shown, data directories to begin with.

    Each of those has its ledger. `seen` counts what happened in any history.
    """

    def __init__(self, config: Config, tokenizer: ChatTokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.beginnings: list[tuple[Path, Ledger]] = []
        self.seen: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self.vllm = FakeVllm(tokenizer, says=self.repeat)
        self.do(self.vllm.start())

    def do(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(work)

    def repeat(self, prompt: str) -> str:
        style = EXCLAIMS if len(self.vllm.asked) % 2 else STATES
        return " ".join([style, *dict.fromkeys(WORD.findall(prompt))][:12])

    def close(self) -> None:
        self.do(self.vllm.stop())
        self.loop.close()


class Histories(RuleBasedStateMachine):
    """One history. Each law is an invariant below; the rules are what may happen."""

    stage: Stage

    @initialize(beginning=st.integers(0, len(SAID_BEFORE) - 1))
    def begin(self, beginning: int) -> None:
        template, ledger = self.stage.beginnings[beginning]
        self.ledger = copy.deepcopy(ledger)
        self.data = Path(tempfile.mkdtemp(prefix="kibitz-history-", dir=_quick_directory()))
        shutil.copytree(template, self.data, dirs_exist_ok=True)
        moved = str(template), str(self.data)
        for name, (parent, path, *known) in self.ledger.versions.items():
            self.ledger.versions[name] = parent, path.replace(*moved), *known
        self.stage.vllm.adapters.clear()
        self.stage.vllm.asked.clear()
        serving = self.stage.config.serving.model_copy(update={"url": self.stage.vllm.url})
        self.config = self.stage.config.model_copy(update={"data_dir": str(self.data), "serving": serving})
        self.start()

    def say_something(self) -> None:
        """Let everybody talk and judge, so that there is something to learn, and to forget, from the first step."""
        for number, person in enumerate(4 * PEOPLE):
            self.talk(person, number % len(PLACES))
            self.judge(0, person, FeedbackKind.DISAPPROVAL if number % 2 else FeedbackKind.APPROVAL, False)

    def start(self) -> None:
        """Start kibitz, in a task of its own that ends when it is stopped."""
        self.stop_wanted = asyncio.Event()
        self.told: list[str] = []
        started = self.stage.loop.create_future()

        async def serve() -> None:
            async with app.running(self.config, self.config.policy.model, self.told.append) as kibitz:
                started.set_result(kibitz)
                await self.stop_wanted.wait()

        self.serving = self.stage.loop.create_task(serve())
        self.serving.add_done_callback(lambda task: started.done() or started.set_exception(task.exception()))
        self.kibitz = self.stage.loop.run_until_complete(started)
        self._follow()

    def stop(self) -> None:
        self.stop_wanted.set()
        self.stage.loop.run_until_complete(self.serving)

    def teardown(self) -> None:
        if hasattr(self, "serving") and not self.serving.done():
            self.stop()
        shutil.rmtree(self.data, ignore_errors=True)

    # What may happen

    @rule(person=people, place=places)
    def talk(self, person: str, place: int) -> None:
        said = Said(f"event {len(self.ledger.said)}", person, place, [self.ledger.new_word()])
        self.ledger.said.append(said)
        turn = self.stage.do(self._ask(said))
        said.message_id = turn.message_id
        self._note(turn)

    @precondition(lambda self: self.ledger.said)
    @rule(one=which)
    def deliver_again(self, one: int) -> None:
        said = self._newest(self.ledger.said, one)
        is_comment = not said.event.startswith("event")
        if is_comment or said.is_gone or said.message_id not in {turn.message_id for turn in self.ledger.turns.values()}:
            return  # an answer that was made from forgotten words is gone, and would be given anew
        before, asked = self.kibitz.store.count_rows(), len(self.stage.vllm.asked)
        turn = self.stage.do(self._ask(said))
        assert self.kibitz.store.count_rows() == before, "law 1: the same event twice has one effect"
        assert len(self.stage.vllm.asked) == asked
        assert turn.id in self.ledger.turns

    @precondition(lambda self: self.ledger.turns)
    @rule(
        one=which,
        person=people,
        kind=st.sampled_from(
            [FeedbackKind.APPROVAL, FeedbackKind.DISAPPROVAL, FeedbackKind.COMMENT, FeedbackKind.CORRECTION]
        ),
        is_repeated=st.booleans(),
    )
    def judge(self, one: int, person: str, kind: FeedbackKind, is_repeated: bool) -> None:
        turn = self._newest([*self.ledger.turns.values()], one)
        text = None
        if kind in (FeedbackKind.COMMENT, FeedbackKind.CORRECTION):
            place = next(number for number, place in enumerate(PLACES) if self._place_of(turn) == place.channel)
            event, words = f"comment {len(self.ledger.said)}", [self.ledger.new_word()]
            said = Said(event, person, place, words, turn.message_id)  # it goes with the turn, or with the person
            self.ledger.said.append(said)
            text = f"better {said.words[0]}"
        given = Feedback(turn.id, person, kind, signal=kind, text=text, event_id=f"act {self.ledger.new_act()}")
        assert self.stage.do(self.kibitz.dialogue.record_feedback(given))
        self.ledger.feedback[given.id] = given
        if is_repeated:
            again = replace(given, id=f"{given.id}-again")
            assert not self.stage.do(self.kibitz.dialogue.record_feedback(again)), "law 1: once"

    @precondition(lambda self: self.ledger.feedback)
    @rule(one=which)
    def take_back(self, one: int) -> None:
        given = self._newest([*self.ledger.feedback.values()], one)
        known = {row.id for row in self._feedback(given.turn_id)}
        assert self.stage.do(self.kibitz.dialogue.retract(given.id, given.user_id))
        [added] = [row for row in self._feedback(given.turn_id) if row.id not in known]
        self.ledger.feedback[added.id] = added

    @precondition(lambda self: self.ledger.turns)
    @rule(one=which, person=people)
    def regenerate(self, one: int, person: str) -> None:
        turn = self._newest([*self.ledger.turns.values()], one)
        known = {row.id for row in self._feedback(turn.id)}
        self._note(self.stage.do(self.kibitz.dialogue.regenerate(turn.id, person)))
        self.ledger.feedback |= {row.id: row for row in self._feedback(turn.id) if row.id not in known}

    @precondition(lambda self: self.ledger.said)
    @rule(one=which)
    def edit(self, one: int) -> None:
        said = self._newest(self.ledger.said, one)
        if said.is_gone or not said.event.startswith("event"):
            return
        said.words.append(self.ledger.new_word())
        at = self.kibitz.store.read_message(said.message_id).at.replace(year=2100, second=self.ledger.count % 60)
        self.stage.do(self.kibitz.dialogue.edit(said.event, f"hello {said.words[-1]}", at.replace(day=1 + len(said.words))))

    @precondition(lambda self: self.ledger.said)
    @rule(one=which)
    def delete(self, one: int) -> None:
        said = self._newest(self.ledger.said, one)
        if not said.is_gone and said.event.startswith("event"):
            self.stage.do(self.kibitz.dialogue.delete(said.event))
            self._forget([said])

    @rule(person=people, consent=st.booleans())
    def decide(self, person: str, consent: bool) -> None:
        self.stage.do(app.make_desk(self.kibitz).manage_consent("test", person, "on" if consent else "off"))
        self.ledger.consent[person] = consent
        self.ledger.decided_since.add(person)

    @rule(person=people)
    def forget(self, person: str) -> None:
        self.stage.do(app.make_desk(self.kibitz).forget_person("test", person))
        self._forget_person(person)
        self._follow()  # as the watcher does within a second

    @rule(deploys=st.booleans())
    def train(self, deploys: bool) -> None:
        with contextlib.suppress(NothingToLearn):
            outcome = train_version(self.config, lambda *_: None, is_deployment_requested=deploys)
            self._note_run(outcome.policy)
            if deploys:
                self._follow()

    @rule()
    def judge_what_waits(self) -> None:
        """As the loop does when more was said."""
        if waiting := self.kibitz.registry.find_waiting():
            judge_waiting(self.config, lambda *_: None)
            self._follow()
            assert waiting[-1].name in self.ledger.runs

    @rule()
    def train_and_fail(self) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("the optimiser broke")

        live = self.kibitz.registry.get_live()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("learning.training.run.train_with_guard", fail)
            with contextlib.suppress(NothingToLearn), pytest.raises(RuntimeError):
                train_version(self.config, lambda *_: None, is_deployment_requested=True)
        assert self.kibitz.registry.get_live() == live

    @precondition(lambda self: self.kibitz.registry.get_live().name == BASE)
    @rule()
    def refuse_to_roll_back(self) -> None:
        with pytest.raises(RegistryError):
            self.kibitz.registry.roll_back()

    @precondition(lambda self: self.kibitz.registry.get_live().name != BASE)
    @rule()
    def roll_back(self) -> None:
        self.stage.do(app.make_desk(self.kibitz).roll_back())
        self.stage.seen["is taken back"] += 1

    @rule()
    def follow(self) -> None:
        self._follow()

    @rule()
    def restart(self) -> None:
        self.stop()
        self.stage.vllm.adapters.clear()  # it was started again too
        self.start()
        there = {one.person for one in self.ledger.said if not one.is_gone} | self.ledger.consent.keys()
        there |= {row.user_id for row in self.ledger.feedback.values()}
        for person in sorted(self.ledger.noted.keys() & there):
            self._forget_person(person, self.ledger.noted[person])

    @rule(person=people, place=places, is_locked=st.booleans(), forgets=st.booleans())
    def lose_the_database_for_a_moment(self, person: str, place: int, is_locked: bool, forgets: bool) -> None:
        before = self.kibitz.store.count_rows()
        self.stage.do(self._outage(person, place, is_locked, forgets))
        assert self.kibitz.store.count_rows() == before, "law 1: what was not acknowledged is not there"
        if forgets and is_locked:  # it was noted before the database refused it
            versions = frozenset(self.ledger.runs)
            self.ledger.noted[person] = Asked(len(self.ledger.said), frozenset(self.ledger.feedback), versions)
            self.ledger.decided_since.discard(person)

    async def _outage(self, person: str, place: int, is_locked: bool, forgets: bool) -> None:
        health, is_failing = self.kibitz.health, "law 9: a supervised task fails, is reported, and goes on"
        look = supervise("watching", self.kibitz.deployment.follow_registry, health, 0.001, longest_pause=0.001)
        watching = asyncio.create_task(look)
        with _locked(self.data) if is_locked else _gone(self.kibitz.database):
            message = Message("", person, "lost", event_id="lost")
            with pytest.raises(DatabaseUnavailable):
                await self.kibitz.dialogue.respond(message, place=PLACES[place])
            if forgets:
                with pytest.raises(DatabaseUnavailable):
                    await app.make_desk(self.kibitz).forget_person("test", person)
            if not is_locked:  # who only reads goes on beside a lock
                await _soon(lambda: "watching" in health.failures, is_failing)
        await _soon(lambda: not health.failures, is_failing)
        watching.cancel()

    # The laws

    @invariant()
    def law_1_acknowledged_means_committed_and_once(self) -> None:
        """Each message and act that was acknowledged is in the file, as another process reads it, once.

        Kills in the middle of it: test_conversations.
        """
        with contextlib.closing(sqlite3.connect(self.data / "kibitz.db")) as other:
            events = [row[0] for row in other.execute("SELECT event_id FROM messages WHERE event_id IS NOT NULL")]
            acts = {row[0] for row in other.execute("SELECT id FROM feedback")}
        assert sorted(events) == sorted(one.event for one in self.ledger.said if one.event.startswith("event"))
        assert acts >= self.ledger.feedback.keys()

    @invariant()
    def law_2_facts_are_kept_and_rewards_are_derived(self) -> None:
        """Feedback stays as it was given; what a turn earned depends on it alone.

        All rules of rewards: test_feedback.
        """
        if not self.ledger.feedback:
            return
        given = {row.id: row for row in self.ledger.feedback.values()}
        found = self.kibitz.store.read_feedback_on({row.turn_id for row in given.values()})
        assert {row.id: row for rows in found.values() for row in rows} == given
        turn_id = [*given.values()][-1].turn_id
        buffer = ReplayBuffer(self.kibitz.store, self.stage.tokenizer, self.config)
        decision = buffer.decide(self.ledger.turns[turn_id])
        assert decision == buffer.decide(self.ledger.turns[turn_id])
        opinions = [row for row in found[turn_id] if row.kind != FeedbackKind.COMMENT]
        taken_back = {(row.user_id, row.kind) for row in opinions if row.retracts}
        if all((row.user_id, row.kind) in taken_back for row in opinions) and len(opinions) == 2 * len(taken_back):
            assert decision.reward is None, "what was taken back is worth nothing"
        if len(opinions) == 1 and decision.reward is not None:
            likes = opinions[0].kind in (FeedbackKind.APPROVAL, FeedbackKind.CORRECTION)
            assert opinions[0].kind == FeedbackKind.CORRECTION or (decision.reward.value > 0) == likes

    @invariant()
    def law_3_a_version_is_immutable(self) -> None:
        """Parent, place and weights of a name never change, nor is a name used again. Hashes of caches: test_registry.

        Where the base model is may change, if it is moved with the same weights (test_registry); no history moves it.
        """
        for version in self.kibitz.registry.all():
            known = (version.parent, version.path, version.base_model, version.created_at)
            assert self.ledger.versions.setdefault(version.name, known) == known
            if version.state in (PolicyState.CANDIDATE, PolicyState.RETIRED, PolicyState.LIVE) and not version.is_base:
                assert fingerprint(Path(version.path)) == version.sha256
        assert len({known[1] for known in self.ledger.versions.values()}) == len(self.ledger.versions)

    @invariant()
    def law_4_every_reply_knows_what_made_it(self) -> None:
        """Turns stay as they were given (what they must name is checked when they are: `_note`). Exactness: test_loop."""
        assert {turn.id: turn for turn in self.kibitz.store.read_turns(self.ledger.turns)} == self.ledger.turns

    @invariant()
    def law_5_nothing_serves_before_it_is_proven(self) -> None:
        """Only versions that were live answered, each after a probe (`_note`). Swaps under load: test_loop."""
        assert {one["model"] for one in self.stage.vllm.asked} <= self.ledger.were_live
        live = [one for one in self.kibitz.registry.all() if one.state == PolicyState.LIVE]
        assert len(live) == 1

    @invariant()
    def law_6_no_evidence_no_promotion(self) -> None:
        """What went live was better by the gate's own statistics, at the level that was left.

        Placebos: test_error_budget.
        """
        versions = self.kibitz.registry.all()
        earlier: list[bool] = []
        for version in versions:
            if version.metrics.had_enough_evidence:
                expected = compute_next_level(1 - self.config.gate.confidence, earlier)
                assert version.metrics.level == pytest.approx(expected), "law 6: each verdict spends from one budget"
            if version.replaced is not None and version.name not in self.ledger.judged:
                self.ledger.judged.add(version.name)
                self.stage.seen["goes live"] += 1
                evidence = EvidenceMetrics.from_json(version.metrics.as_json()).evidence
                assert judge(evidence, self.config.gate, self.config.seed, earlier).passed
                assert version.judged_against == version.replaced
            if version.metrics.had_enough_evidence:
                earlier.append(version.metrics.is_better)
        self.ledger.were_live |= {one.name for one in versions if one.replaced is not None}

    @invariant()
    def law_7_only_those_teach_who_consent(self) -> None:
        """Checked when a run ends (`_note_run`). Strangers and the cap: test_replay_buffer, test_selection."""

    @invariant()
    def law_8_nothing_crosses_scopes(self) -> None:
        """No prompt holds a word from another channel. Public channels and threads: test_recall."""
        for turn in self.ledger.turns.values():
            words = self._words(turn.prompt_ids)
            assert {PLACES[self.ledger.author(word).place].channel for word in words} <= {self._place_of(turn)}

    @invariant()
    def law_9_the_chat_outlives_learning_and_outages(self) -> None:
        """Nothing fails any more after a failed run or an outage; `talk` must always be answered. Engines: test_loop."""
        assert self.kibitz.health.failures == {}
        assert not self.serving.done()

    @invariant()
    def law_10_forgotten_is_gone(self) -> None:
        """No file and no column holds a forgotten word, as text or as token ids, and nothing serves that learned from it.
        Memory and logs: test_places_of_text.
        """
        registry = self.kibitz.registry
        for name in self.ledger.forgotten_teachers:
            version = registry.get(name)
            assert version.state in (PolicyState.PURGED, PolicyState.REJECTED), f"{name} learned from who is forgotten"
            assert version.state == PolicyState.REJECTED or not Path(version.path).exists()
        if not self.ledger.forgotten:
            return
        # While somebody reads, the log is emptied a moment later, and then the file is rebuilt.
        self.stage.do(_soon(lambda: not _is_rebuild_due(self.kibitz.database), "law 10: in the end the file is rebuilt"))
        spelled = [one for word in self.ledger.forgotten for one in self._spellings(word)]
        pattern = re.compile(b"|".join(re.escape(one.encode()) + rb"(?!\d)" for one in sorted(spelled)))
        for path in self.data.rglob("*"):
            assert not path.is_file() or not (found := pattern.search(path.read_bytes())), f"{found} is still in {path}"

    # What the test notes

    async def _ask(self, said: Said) -> Turn:
        message = Message("", said.person, f"hello {said.words[0]}", event_id=said.event)
        return await self.kibitz.dialogue.respond(message, place=PLACES[said.place])

    def _note(self, turn: Turn) -> None:
        """Note an answer; laws 4 and 5 say what it must name."""
        asked = self.stage.vllm.asked[-1]
        assert (turn.policy_version, list(turn.prompt_ids)) == (asked["model"], asked["prompt"])
        assert list(turn.completion_ids) == self.stage.tokenizer.completion_ids(turn.text)[: asked["max_tokens"]]
        assert len(turn.logprobs) == len(turn.completion_ids)
        for word in self._words(turn.prompt_ids):
            said = self.ledger.author(word)
            repeats = [one for one in self.ledger.turns.values() if word in one.text or one.message_id == said.message_id]
            made_from = {said.message_id, *(one.reply_id for one in repeats)}
            assert turn.sources & made_from, f"law 4: its sources do not name where {word} came from"
        probed = self.kibitz.deployment.probed
        assert turn.policy_version == BASE or probed[turn.policy_version].passed
        self.ledger.turns[turn.id] = self.kibitz.store.find_turn(turn.id)

    def _note_run(self, name: str) -> None:
        """Note who taught a version; law 7 says who may."""
        with self.kibitz.database.read() as connection:
            query = sa.select(run_feedback.c.feedback_id).join(runs).where(runs.c.policy == name)
            used = [self.ledger.feedback[one] for one in connection.execute(query).scalars() if one in self.ledger.feedback]
        teachers: set[str] = set()
        for row in used:
            turn = self.ledger.turns[row.turn_id]
            teachers |= {row.user_id, turn.asker_id}
            teachers |= {self.ledger.author(word).person for word in self._words(turn.prompt_ids)}
        unwilling = {one for one in teachers if not self.ledger.consent.get(one, True)}
        assert not unwilling, f"law 7: {name} learned from {unwilling}"
        self.ledger.runs[name] = teachers
        self.stage.seen["a run with teachers"] += bool(teachers)
        self.stage.seen["a version waits"] += self.kibitz.registry.get(name).state == PolicyState.WAITING

    def _forget_person(self, person: str, asked: Asked | None = None) -> None:
        """Note that a person is forgotten, and, if they had `asked` for it earlier, that what came since is not."""
        ledger = self.ledger
        if asked is None or person not in ledger.decided_since:
            ledger.consent[person] = False
        asked = asked or Asked(len(ledger.said), frozenset(ledger.feedback), frozenset(ledger.runs))
        ledger.noted.pop(person, None)
        ledger.forgotten_teachers |= {name for name in asked.versions if person in ledger.runs[name]}
        self.stage.seen["a version loses its teacher"] += bool(ledger.forgotten_teachers)
        gone = {row.id for row in ledger.feedback.values() if row.user_id == person and row.id in asked.feedback}
        ledger.feedback = {key: row for key, row in ledger.feedback.items() if key not in gone}
        self._forget([one for one in ledger.said[: asked.said] if one.person == person])

    def _forget(self, gone: list[Said]) -> None:
        """Note that messages are forgotten, and with them all answers that were shown any of their words."""
        words = {word for one in gone for word in one.words}
        for one in gone:
            one.is_gone = True
        ids = {one.message_id for one in gone if one.event.startswith("event")}
        made = {
            key for key, turn in self.ledger.turns.items() if turn.message_id in ids or words & self._words(turn.prompt_ids)
        }
        there = {key for key in self.ledger.turns if self.kibitz.store.find_turn(key) is not None}
        assert not made & there, "law 10: what was made from forgotten words goes"
        lost = {self._place_of(turn) for key, turn in self.ledger.turns.items() if key not in there}
        assert lost <= {PLACES[one.place].channel for one in gone}, "nothing goes where nothing was forgotten"
        on_lost = {row.id for row in self.ledger.feedback.values() if row.turn_id not in there}
        for row_id in on_lost:
            row = self.ledger.feedback.pop(row_id)
            words |= set(WORD.findall(row.text or ""))
        self.ledger.turns = {key: turn for key, turn in self.ledger.turns.items() if key in there}
        self.ledger.forgotten |= words

    def _follow(self) -> None:
        self.stage.do(self.kibitz.deployment._follow_and_deploy())
        assert self.kibitz.policy.version == self.kibitz.registry.get_live().name, "law 5: who is live answers"

    def _feedback(self, turn_id: str) -> list[Feedback]:
        return self.kibitz.store.read_feedback_on([turn_id]).get(turn_id, [])

    def _place_of(self, turn: Turn) -> str:
        if turn.conversation_id not in self.ledger.channels:
            self.ledger.channels[turn.conversation_id] = self.kibitz.store.read_conversation(turn.conversation_id).channel
        return self.ledger.channels[turn.conversation_id]

    def _words(self, ids: Any) -> set[str]:
        return set(WORD.findall(self.stage.tokenizer.hf.decode(list(ids))))

    def _spellings(self, word: str) -> list[str]:
        ids = [self.stage.tokenizer.hf.encode(before + word, add_special_tokens=False) for before in ("", " ")]
        return [word, *(json.dumps(one)[1:-1] for one in ids)]

    @staticmethod
    def _newest(all_: list[Result], number: int) -> Result:
        return all_[-1 - number % len(all_)]


class Few(Histories):
    """Histories in which only what matters to the planted faults happens, so that they are found soon."""

    talk = judge = deliver_again = take_back = regenerate = edit = restart = follow = None  # much was said before they begin
    train_and_fail = judge_what_waits = roll_back = refuse_to_roll_back = lose_the_database_for_a_moment = None


async def _soon(condition: Any, law: str) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.001)
    assert condition(), law


def _is_rebuild_due(database: Database) -> bool:
    with database.read() as connection:
        return connection.execute(sa.select(switches.c.name).where(switches.c.name == DUE)).first() is not None


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Inside, another program is writing to the database."""
    with contextlib.closing(sqlite3.connect(data / "kibitz.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def _gone(database: Database) -> Iterator[None]:
    """Inside, the database's file cannot be opened."""

    def refuse(*_: Any) -> None:
        error = sqlite3.OperationalError("unable to open database file")
        error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
        raise error

    database.engine.dispose()
    sa.event.listen(database.engine, "do_connect", refuse)
    try:
        yield
    finally:
        sa.event.remove(database.engine, "do_connect", refuse)


def _quick_directory() -> str | None:
    """A directory in memory, where there is one: a commit waits for no disk there."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture(scope="module")
def stage(demo_model, tokenizer, tmp_path_factory) -> Iterator[Stage]:
    config = load(
        policy={"model": demo_model},
        dialogue={"embedder": "none"},
        learning={"held_out": 0.3, "detect_drift": False},
        gate={"confidence": 0.6, "samples": 16},
    )
    made = Stage(config, tokenizer)
    with learn_in_an_instant(tokenizer) as patch:
        patch.setattr("learning.judging.gate.bootstrap", partial(_bootstrap, draws=10))  # intervals, which decide nothing
        patch.setattr("bot.app.ChatTokenizer", lambda *_: tokenizer)
        patch.setattr("bot.app.gc", SimpleNamespace(collect=lambda: 0, freeze=lambda: None))
        patch.setattr("bot.store.database.BUSY_SECONDS", 0.01)
        patch.setattr("bot.store.rebuild.DELAY_SECONDS", 0.01)
        # What watches in the background looks when a history wants it to, so that a history can be repeated.
        patch.setattr(Deployment, "watch", partialmethod(Deployment.watch, 3600.0))
        patch.setattr("bot.app.PAUSE_SECONDS", 3600.0)
        patch.setattr("learning.rollout.selector.HeadSelector.run", lambda _: asyncio.Event().wait())
        for turns, is_trained in SAID_BEFORE:
            made.beginnings.append((_talked(made, tmp_path_factory.mktemp("template"), turns), Ledger()))
            first = _histories(made)()
            first.begin(-1)
            first.say_something()
            if is_trained:
                first.train(deploys=True)
                first.law_6_no_evidence_no_promotion()
            first.stop()
            made.beginnings[-1] = first.data, first.ledger
        yield made
    for data, _ in made.beginnings:
        shutil.rmtree(data)
    made.close()


def _talked(stage: Stage, data: Path, turns: int) -> Path:
    """Let others, who are not in the ledger, talk and judge in a new data directory."""
    config = stage.config.model_copy(update={"data_dir": str(data)})
    database = Database(config.database_url, config.data)
    database.upgrade()
    store = ConversationStore(database)
    PolicyRegistry(database).ensure_base(config.policy.model)
    for number in range(turns):
        exclaims = bool(number % 2)
        answer = EXCLAIMS if exclaims else STATES
        turn = answered(store, stage.tokenizer, f"question number {number}", answer, author=f"person{number % 8}")
        react(store, turn, exclaims, f"person{number % 8}")
    database.close()
    return data


def _bootstrap(statistic, signs, confidence, seed, draws):
    return statistics.bootstrap(statistic, signs, confidence, seed, draws)


def _histories(stage: Stage, kind: type[Histories] = Histories) -> type[Histories]:
    return type("Histories", (kind,), {"stage": stage})


def run(stage: Stage, histories: int, kind: type[Histories] = Histories, **changes: Any) -> None:
    """Try random histories."""
    wanted: dict[str, Any] = {"derandomize": True, "database": None, "deadline": None, "stateful_step_count": STEPS}
    wanted |= {"max_examples": histories, "suppress_health_check": list(HealthCheck)} | changes
    run_state_machine_as_test(_histories(stage, kind), settings=settings(**wanted))


def test_the_laws_hold_in_every_history(stage, request):
    wanted = request.config.getoption("--histories")
    stage.seen.clear()
    run(stage, wanted or HISTORIES, derandomize=not wanted)
    seldom = {"a run with teachers", "a version waits", "goes live", "is taken back", "a version loses its teacher"}
    assert (+stage.seen).keys() == seldom, f"the laws are not checked in vain: {stage.seen}"


@pytest.mark.parametrize(
    ("place", "does", "law"),
    [
        ("bot.store.forgetting.find_answers_from", {}, "law 10: what was made from forgotten words goes"),
        ("bot.store.registry.PolicyRegistry.purge_taught", [], "learned from who is forgotten"),
        ("learning.data.voices.Consent.is_given_by", True, "law 7"),
        ("learning.training.lesson.read_earlier_verdicts", [], "law 6"),
    ],
    ids=["answers-stay", "versions-stay", "all-teach", "nothing-is-spent"],
)
def test_a_planted_fault_is_found(stage, monkeypatch, place, does, law):
    """The control: the histories can fail."""
    monkeypatch.setattr(place, lambda *_: does)
    with pytest.raises(AssertionError, match=law):
        run(stage, HISTORIES, Few, phases=[Phase.generate], report_multiple_bugs=False)
