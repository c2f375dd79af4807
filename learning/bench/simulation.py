"""Simulate users who talk and react, and measure by their hidden utility what the policy learns from them.

Each user has a deterministic utility over texts that training never sees. Users talk through DialogueManager, react
sparsely and with noise, and never say the held-out prompts by which versions are judged. A frozen control (version 0, never
trained) answers the same prompts with the same sampling seeds. Users say the toy's own prompts to the toy policy, and
everyday English to every other model. Versions are trained by `OnlineLearner.learn_once`.

Run: ``kibitz simulate``, or with other users ``kibitz simulate --users FILE.py``.
"""

import asyncio
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.table import Table
from rich.text import Text

from bot.chat.dialogue import DialogueManager, ReplyOptions
from bot.errors import ConfigError, NothingToLearn, ProbeFailed
from bot.serving.policy import Policy
from bot.store.database import Database
from bot.store.tables import conversations
from bot.types import Conversation, Feedback, FeedbackKind, Message, Progress, Reply, Turn, new_id
from bot.wording import count_noun
from learning.bench.simulated_people import People, Prompts
from learning.judging.evaluation import is_well_formed
from learning.judging.statistics import mean_interval
from learning.rollout.loop import OnlineLearner

PLATFORM = "simulation"  # the platform of simulated people
CONCURRENT = 16
SHOWN = 3  # held-out prompts whose answers are shown before and after
DECISIVENESS = 4.0  # a user gives an answer of utility u 👍 with probability sigmoid(4u), else 👎


@dataclass(frozen=True)
class CurveRow:
    """The scores of one policy version."""

    version: str
    reactions: int
    utility: float
    low: float
    high: float
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
    note: str

    def to_line(self) -> str:
        """Format the row as one line, to announce it while the simulation runs."""
        return (
            f"{self.version}: utility {self.utility:+.2f} ({self.low:+.2f} to {self.high:+.2f}), "
            f"frozen {self.frozen:+.2f}, {count_noun(self.reactions, 'reaction')}" + (f"; {self.note}" if self.note else "")
        )


@dataclass(frozen=True)
class HeldOutAnswers:
    """A version's answers to the held-out prompts: utility by prompt, first answer by prompt, and shares of all answers."""

    utilities: dict[str, float]
    first: dict[str, str]
    well_formed: float
    ended: float


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
    """Runs rounds of talk -> train -> gate -> swap, and scores every version."""

    def __init__(
        self,
        dialogue: DialogueManager,
        policy: Policy,
        learner: OnlineLearner,
        people: People,
        asked: Prompts,
        progress: Progress,
    ):
        self.dialogue = dialogue
        self.policy = policy
        self.learner = learner
        self.people = people
        self.asked = asked
        self.rng = random.Random(people.seed)
        self.progress = progress
        self.rows: list[CurveRow] = []
        self.samples: list[dict[str, str]] = []
        self.refused: list[str] = []  # errors of versions that passed the gate but failed the probe
        self.promoted: list[str] = []

    async def run(self, rounds: int, messages: int, samples: int, show: Callable[[CurveRow], None]) -> list[CurveRow]:
        """Run `rounds` times: talk (`messages` exchanges), train, score the live version on `samples` answers per prompt."""
        self._frozen = await self._ask_held_out(self.policy.admin.base, samples)
        await self._judge(samples, approval=None, kl=0.0, note="the start", show=show)
        for number in range(1, rounds + 1):
            approvals = await self._talk(messages, f"round {number}: talking")
            kl, note = await self._learn()
            approval = sum(approvals) / len(approvals) if approvals else None
            last = await self._judge(samples, approval, kl, note, show)
            self.samples = [
                {"prompt": prompt, "before": self._frozen.first[prompt], "after": last.first[prompt]}
                for prompt in self.asked.held_out[:: max(1, len(self.asked.held_out) // SHOWN)][:SHOWN]
            ]
        return self.rows

    async def _talk(self, messages: int, stage: str) -> list[bool]:
        """Let people say `messages` messages and react to some answers. Returns the reactions (True for 👍)."""
        said = [self.rng.choice(self.asked.said) for _ in range(messages)]
        moods = [(self.rng.random(), self.rng.random(), self.rng.random(), self.rng.randrange(2**31)) for _ in said]
        given: list[bool] = []

        async def one(text: str, mood: tuple[float, float, float, int]) -> None:
            attention, taste, slip, seed = mood
            user = f"user-{seed % 40}"
            place = await self.dialogue.open(Conversation(PLATFORM, channel=new_id()))
            turn = await self.dialogue.respond(Message(place.id, user, text), ReplyOptions(seed=seed))
            if attention < self.people.reaction_rate:
                approves = taste < 1 / (1 + math.exp(-DECISIVENESS * self.people.utility(text, turn.text)))
                approves ^= slip < self.people.noise
                await self._react(turn, user, approves)
                given.append(approves)

        await self._gather([one(text, mood) for text, mood in zip(said, moods, strict=True)], stage)
        return given

    async def _react(self, turn: Turn, user: str, approves: bool) -> None:
        kind = FeedbackKind.APPROVAL if approves else FeedbackKind.DISAPPROVAL
        await self.dialogue.record_feedback(Feedback(turn.id, user, kind, signal="👍" if approves else "👎"))

    async def _learn(self) -> tuple[float, str]:
        kl, served = self.rows[-1].kl if self.rows else 0.0, self.policy.version
        await self.learner.judge_waiting()  # as the loop does before a run, which supersedes a version that still waits
        if self.policy.version != served:
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
    ) -> HeldOutAnswers:
        """Add a row with the live version's true utility on the held-out prompts, beside the frozen control's."""
        seed = self.people.seed
        version = self.policy.version
        live = self._frozen if version == self.policy.admin.base else await self._ask_held_out(version, samples)
        mean, low, high = mean_interval([*live.utilities.values()], seed)
        frozen_mean, frozen_low, frozen_high = mean_interval([*self._frozen.utilities.values()], seed)
        gains = [live.utilities[prompt] - self._frozen.utilities[prompt] for prompt in self.asked.held_out]
        gain, gain_low, gain_high = mean_interval(gains, seed)
        row = CurveRow(
            version=self.policy.version,
            reactions=await self.dialogue.store.database.call(self.dialogue.store.count_reactions),
            utility=mean,
            low=low,
            high=high,
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
            note=note,
        )
        self.rows.append(row)
        show(row)
        return live

    async def _ask_held_out(self, version: str, samples: int) -> HeldOutAnswers:
        """Ask a version each held-out prompt `samples` times, with the same sampling seeds as every other version."""
        replies: dict[str, dict[int, Reply]] = {prompt: {} for prompt in self.asked.held_out}

        async def one(prompt: str, number: int, seed: int) -> None:
            context = self.dialogue.tracker.fit_messages([{"role": "user", "content": prompt}])
            replies[prompt][number] = await self.policy.reply(context.prompt_ids, version=version, seed=seed)

        seeds = random.Random(self.people.seed)
        work = [one(prompt, number, seeds.randrange(2**31)) for number in range(samples) for prompt in self.asked.held_out]
        await self._gather(work, f"judging {version}")
        every = [reply for those in replies.values() for reply in those.values()]
        return HeldOutAnswers(
            utilities={
                prompt: sum(self.people.utility(prompt, reply.text) for reply in those.values()) / len(those)
                for prompt, those in replies.items()
            },
            first={prompt: those[0].text for prompt, those in replies.items()},
            well_formed=sum(is_well_formed(reply.text) for reply in every) / len(every),
            ended=sum(reply.finish_reason == "stop" for reply in every) / len(every),
        )

    async def _gather(self, work: Sequence[Any], stage: str) -> None:
        places = asyncio.Semaphore(CONCURRENT)
        done = 0

        async def one(job: Any) -> None:
            nonlocal done
            async with places:
                await job
            done += 1
            self.progress(stage, done, len(work))

        async with asyncio.TaskGroup() as group:
            for job in work:
                group.create_task(one(job))


def compute_figures(played: Simulation, model: str) -> dict[str, Any]:
    """Return the figures of a simulation, for its JSON file. `model` is the base model's name in the config.

    `utility_gain` is paired by prompt against the frozen control; probe distances (nats) are those of the last probe.
    """
    rows = played.rows
    first, last = rows[0], rows[-1]
    probed = [*played.learner.deployment.probed.values()][-1:]
    found: dict[str, Any] = {}
    for name, (value, low, high) in {
        "first_utility": (first.utility, first.low, first.high),
        "last_utility": (last.utility, last.low, last.high),
        "frozen_utility": (last.frozen, last.frozen_low, last.frozen_high),
        "utility_gain": (last.gain, last.gain_low, last.gain_high),
    }.items():
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    versions = {row.version for row in rows}
    return {
        **found,
        "well_formed": min(row.well_formed for row in rows),
        "ended": last.ended,
        "promoted": len(played.promoted),
        "refused_by_probe": len(played.refused),
        "probe_distance": probed[0].distance if probed else None,
        "probe_from_parent": probed[0].from_parent if probed else None,
        "model": model,
        "samples": played.samples,
        "versions": len(versions),
        "reactions": last.reactions,
        "kl": last.kl,
        "curve": [asdict(row) for row in rows],
    }


def make_table(rows: Sequence[CurveRow]) -> Table:
    """Make a table of the rows of a simulation."""
    names = ("version", "reactions", "true utility (95%)", "frozen (95%)", "approval", "KL", "well-formed", "ended")
    found = Table(*names, title="true utility on held-out prompts")
    for row in rows:
        found.add_row(
            row.version,
            str(row.reactions),
            f"{row.utility:+.2f} ({row.low:+.2f} to {row.high:+.2f})",
            f"{row.frozen:+.2f} ({row.frozen_low:+.2f} to {row.frozen_high:+.2f})",
            "" if row.approval is None else f"{row.approval:.0%}",
            f"{row.kl:.3f}",
            f"{row.well_formed:.0%}",
            f"{row.ended:.0%}",
        )
    return found


def make_samples_table(samples: Sequence[dict[str, str]]) -> Table:
    """Make a table of some held-out prompts with the answers of version 0 and of the last version."""
    found = Table("prompt", "before", "after", title="the same prompts, before and after", show_lines=True)
    for row in samples:
        found.add_row(*(Text(row[name]) for name in ("prompt", "before", "after")))
    return found


def plot(rows: Sequence[CurveRow], path: Path, title: str) -> None:
    """Plot the learning curve: true utility on held-out prompts against reactions, beside the frozen control."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    reactions = [row.reactions for row in rows]
    for name, colour, line, low, high in (
        ("kibitz", "tab:blue", [r.utility for r in rows], [r.low for r in rows], [r.high for r in rows]),
        (
            "frozen control",
            "tab:gray",
            [r.frozen for r in rows],
            [r.frozen_low for r in rows],
            [r.frozen_high for r in rows],
        ),
    ):
        axes.plot(reactions, line, marker="o", color=colour, label=name)
        axes.fill_between(reactions, low, high, color=colour, alpha=0.2, linewidth=0)
    seen: set[str] = set()
    for row in rows:
        if row.version not in seen:
            axes.annotate(
                row.version,
                (row.reactions, row.high),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
            seen.add(row.version)
    axes.set(xlabel="reactions so far", ylabel="true utility on held-out prompts", ylim=(-1.05, 1.05), title=title)
    axes.legend(loc="lower right", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
