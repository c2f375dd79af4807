"""Simulate users who talk and react, and measure by their hidden utility what kibitz learns from them.

Each user has a deterministic utility over texts that training never sees. Users talk through DialogueManager, react
sparsely and with noise, and never say the held-out prompts by which answers are judged. Users say the toy's own prompts to
the toy policy, and everyday English to every other model. Versions are trained by `OnlineLearner.learn_once`.

Two things learn, and each is judged apart:

- *weights*: single answers of the live version.
- *served*: its answers as the reward head chooses them, from as many as it may. The plain tenth is left out.

A frozen control (version 0, never trained) answers the same prompts with the same sampling seeds. Judging teaches nothing.

Run: ``kibitz simulate``, or with other users ``kibitz simulate --users FILE.py``.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from bot.chat.dialogue import DialogueManager, ReplyOptions
from bot.errors import ConfigError, NothingToLearn, ProbeFailed
from bot.serving.policy import Policy
from bot.store.database import Database
from bot.store.tables import conversations
from bot.types import Conversation, Feedback, FeedbackKind, Message, Progress, Turn, new_id
from bot.wording import count_noun
from learning.bench.held_out import CONCURRENT, HeldOutAnswers, HeldOutJudge, ServedAnswers, run_together
from learning.bench.simulated_people import People, Prompts
from learning.judging.statistics import mean_interval
from learning.rollout.loop import OnlineLearner
from learning.rollout.selector import HeadSelector

PLATFORM = "simulation"  # the platform of simulated people
EARLY = (20, 40)  # reactions after which the first round has rows of its own
SHOWN = 3  # held-out prompts whose answers are shown before and after
DECISIVENESS = 4.0  # a user gives an answer of utility u 👍 with probability sigmoid(4u), else 👎


@dataclass(frozen=True)
class CurveRow:
    """The scores of one policy version: of its single answers, and of its `served_` ones, chosen from `candidates`.

    Gains are paired by prompt against the frozen control.
    """

    version: str
    reactions: int
    utility: float
    low: float
    high: float
    candidates: int
    served_utility: float
    served_low: float
    served_high: float
    frozen: float
    frozen_low: float
    frozen_high: float
    approval: float | None
    kl: float
    well_formed: float
    ended: float
    gain: float
    gain_low: float
    gain_high: float
    served_gain: float
    served_gain_low: float
    served_gain_high: float
    note: str

    def to_line(self) -> str:
        """Format the row as one line, to announce it while the simulation runs."""
        chosen = f"chosen from {self.candidates}" if self.candidates > 1 else "not chosen"
        return (
            f"{self.version}: utility {self.utility:+.2f} ({self.low:+.2f} to {self.high:+.2f}), "
            f"served {self.served_utility:+.2f} ({chosen}), "
            f"frozen {self.frozen:+.2f}, {count_noun(self.reactions, 'reaction')}" + (f"; {self.note}" if self.note else "")
        )


@dataclass(frozen=True)
class SaidMessage:
    """What a user says. `attention`, `taste` and `slip`, each in [0, 1), decide about the reaction to the answer."""

    text: str
    attention: float
    taste: float
    slip: float
    seed: int


def check_only_simulated(database: Database) -> None:
    """Raise ConfigError if real people talked on this database, because simulated ones would teach the same policy."""
    query = sa.select(conversations.c.platform).where(conversations.c.platform != PLATFORM).limit(1)
    with database.read() as connection:
        platform = connection.execute(query).scalar()
    if platform is not None:
        raise ConfigError(
            f"the database holds conversations of people ({platform}), and simulated ones would teach the same policy; use "
            "another --data-dir (and no database.url)"
        )


class Simulation:
    """Runs rounds of talk -> train -> gate -> swap, and scores every version, with and without the head's choice."""

    def __init__(
        self,
        dialogue: DialogueManager,
        policy: Policy,
        learner: OnlineLearner,
        selector: HeadSelector | None,
        people: People,
        asked: Prompts,
        progress: Progress,
    ):
        self.dialogue = dialogue
        self.policy = policy
        self.learner = learner
        self.selector = selector
        self.people = people
        self.asked = asked
        self.rng = random.Random(people.seed)
        self.progress = progress
        self.rows: list[CurveRow] = []
        self.samples: list[dict[str, str]] = []
        self.refused: list[str] = []  # errors of versions that passed the gate but failed the probe
        self.promoted: list[str] = []
        self.first_choice_reactions: int | None = None  # reactions after which an answer was first chosen from several
        self.judge = HeldOutJudge(dialogue, policy, selector, people, asked.held_out, progress)

    async def run(self, rounds: int, messages: int, samples: int, show: Callable[[CurveRow], None]) -> list[CurveRow]:
        """Run `rounds` times: talk (`messages` exchanges), train, score the live version on `samples` answers per prompt.

        In the first round there is a row after each number of reactions in EARLY, too. People talk one after the other until
        the first of these, so that what few reactions change does not depend on who is faster.
        """
        self._frozen = await self.judge.ask(self.policy.admin.base, samples)
        await self._judge(samples, approval=None, kl=0.0, note="the start", show=show)
        for number in range(1, rounds + 1):
            drawn = self._draw_messages(messages)
            approvals: list[bool] = []
            done = 0
            for count in EARLY if number == 1 else ():
                if end := self._count_messages_until(count, drawn):
                    stage = f"the first {count} reactions"
                    approvals += await self._talk(drawn[done:end], stage, CONCURRENT if done else 1)
                    await self._judge(samples, _share(approvals), self.rows[-1].kl, stage, show)
                    done = end
            approvals += await self._talk(drawn[done:], f"round {number}: talking", CONCURRENT)
            kl, note = await self._learn()
            last, served = await self._judge(samples, _share(approvals), kl, note, show)
            self.samples = [
                {
                    "prompt": prompt,
                    "before": self._frozen.first[prompt],
                    "after": last.first[prompt],
                    "served": served.likeliest[prompt],
                }
                for prompt in self.asked.held_out[:: max(1, len(self.asked.held_out) // SHOWN)][:SHOWN]
            ]
        return self.rows

    def _draw_messages(self, count: int) -> list[SaidMessage]:
        said = [self.rng.choice(self.asked.said) for _ in range(count)]
        return [
            SaidMessage(text, self.rng.random(), self.rng.random(), self.rng.random(), self.rng.randrange(2**31))
            for text in said
        ]

    def _count_messages_until(self, count: int, drawn: Sequence[SaidMessage]) -> int:
        """Return the number of messages until there are `count` reactions; 0 if no more reactions follow."""
        reacting = [number for number, one in enumerate(drawn, start=1) if one.attention < self.people.reaction_rate]
        return reacting[count - 1] if len(reacting) > count else 0

    async def _talk(self, said: Sequence[SaidMessage], stage: str, together: int) -> list[bool]:
        """Let people say messages, `together` at once, and react to some answers. Returns the reactions (True for 👍)."""
        given: list[bool] = []

        async def one(message: SaidMessage) -> None:
            user = f"user-{message.seed % 40}"
            place = await self.dialogue.open(Conversation(PLATFORM, channel=new_id()))
            turn = await self.dialogue.respond(Message(place.id, user, message.text), ReplyOptions(seed=message.seed))
            if turn.is_selected and self.first_choice_reactions is None:
                await self._note_first_choice(turn)
            if message.attention < self.people.reaction_rate:
                utility = self.people.utility(message.text, turn.text)
                approves = message.taste < 1 / (1 + math.exp(-DECISIVENESS * utility))
                approves ^= message.slip < self.people.noise
                await self._react(turn, user, approves)
                given.append(approves)

        await run_together([one(message) for message in said], together, stage, self.progress)
        return given

    async def _note_first_choice(self, turn: Turn) -> None:
        count = await self._count_reactions()
        if self.first_choice_reactions is None and turn.selection is not None:
            self.first_choice_reactions = count
            candidates = len(turn.selection.candidates)
            self.learner.announce(f"after {count_noun(count, 'reaction')}: answers are chosen from {candidates} now")

    async def _count_reactions(self) -> int:
        return await self.dialogue.store.database.call(self.dialogue.store.count_reactions)

    async def _react(self, turn: Turn, user: str, approves: bool) -> None:
        kind = FeedbackKind.APPROVAL if approves else FeedbackKind.DISAPPROVAL
        await self.dialogue.record_feedback(Feedback(turn.id, user, kind, signal="👍" if approves else "👎"))
        if self.selector is not None:
            await self.selector.wait_until_current()

    async def _learn(self) -> tuple[float, str]:
        kl, before = self.rows[-1].kl if self.rows else 0.0, self.policy.version
        await self.learner.judge_waiting()  # as the loop does before a run, which supersedes a version that still waits
        if self.policy.version != before:
            self.promoted.append(self.policy.version)
            kl = self._kl_of(self.policy.version)
        try:
            outcome = await self.learner.learn_once()
        except NothingToLearn as error:
            self.learner.announce(f"nothing learned: {error}")
            return kl, str(error)
        except ProbeFailed as error:  # the live version keeps serving
            self.refused.append(str(error))
            self.learner.announce(str(error))
            return kl, str(error)
        if not outcome.passed:
            verdict = "waits" if outcome.waits else "rejected"
            return kl, f"{outcome.policy} {verdict}: {'; '.join(outcome.reasons)}"
        self.promoted.append(outcome.policy)
        return self._kl_of(outcome.policy), ""

    def _kl_of(self, version: str) -> float:
        return self.learner.deployment.registry.get(version).metrics.kl or 0.0

    async def _judge(
        self, samples: int, approval: float | None, kl: float, note: str, show: Callable[[CurveRow], None]
    ) -> tuple[HeldOutAnswers, ServedAnswers]:
        """Add a row with the true utility of the live version's single and served answers to the held-out prompts, beside
        the frozen control's.
        """
        version = self.policy.version
        live = self._frozen if version == self.policy.admin.base else await self.judge.ask(version, samples)
        served = await self.judge.choose(version, live)
        mean, low, high = self._describe(live.utilities)
        served_mean, served_low, served_high = self._describe(served.utilities)
        frozen_mean, frozen_low, frozen_high = self._describe(self._frozen.utilities)
        gain, gain_low, gain_high = self._describe_gain(live.utilities)
        served_gain, served_gain_low, served_gain_high = self._describe_gain(served.utilities)
        row = CurveRow(
            version=version,
            reactions=await self._count_reactions(),
            utility=mean,
            low=low,
            high=high,
            candidates=served.candidates,
            served_utility=served_mean,
            served_low=served_low,
            served_high=served_high,
            frozen=frozen_mean,
            frozen_low=frozen_low,
            frozen_high=frozen_high,
            approval=approval,
            kl=kl,
            well_formed=live.well_formed,
            ended=live.ended,
            gain=gain,
            gain_low=gain_low,
            gain_high=gain_high,
            served_gain=served_gain,
            served_gain_low=served_gain_low,
            served_gain_high=served_gain_high,
            note=note,
        )
        self.rows.append(row)
        show(row)
        return live, served

    def _describe(self, utilities: dict[str, float]) -> tuple[float, float, float]:
        return mean_interval([*utilities.values()], self.people.seed)

    def _describe_gain(self, utilities: dict[str, float]) -> tuple[float, float, float]:
        return self._describe({prompt: value - self._frozen.utilities[prompt] for prompt, value in utilities.items()})


def _share(approvals: Sequence[bool]) -> float | None:
    return sum(approvals) / len(approvals) if approvals else None
