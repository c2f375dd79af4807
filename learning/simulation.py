"""Simulated users with hidden preferences talk, react and are listened to; what they gain is their true utility.

Each user has a deterministic utility over texts that only this module sees. Users talk through DialogueManager, react
sparsely and with noise, and never say the prompts that versions are judged by. A frozen control (version 0, never
trained) is judged beside every version. It knows no training: it calls `OnlineLearner.step`.

Run: ``kibitz simulate``, or with other users ``kibitz simulate --users FILE.py``.
"""

import asyncio
import math
import random
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bot.dialogue import DialogueManager, ReplyOptions
from bot.errors import ConfigError, NothingToLearn
from bot.policy import Policy
from bot.registry import BASE
from bot.types import Conversation, Feedback, FeedbackKind, Message, Turn, new_id
from learning import demo
from learning.evaluation import EMOJI, is_well_formed, mean_interval
from learning.loop import OnlineLearner

Utility = Callable[[str, str], float]
Progress = Callable[[str, int, int], None]

CONCURRENT = 16
DECISIVENESS = 4.0  # a user who finds an answer's utility u gives 👍 with probability sigmoid(4u), else 👎


def brief(prompt: str, reply: str) -> float:
    """Likes few words: +1 up to 5 words, -1 from 17 on."""
    return max(-1.0, min(1.0, (11 - len(reply.split())) / 6))


def emoji(prompt: str, reply: str) -> float:
    """Likes an emoji."""
    return 1.0 if EMOJI.search(reply) else -1.0


def curious(prompt: str, reply: str) -> float:
    """Likes to be asked back."""
    return 1.0 if reply.rstrip().rstrip("\ufe0f").endswith("?") or re.search(r"\? \W+$", reply) else -1.0


def lively(prompt: str, reply: str) -> float:
    """Likes an emoji and a question back, half each."""
    return (emoji(prompt, reply) + curious(prompt, reply)) / 2


def casual(prompt: str, reply: str) -> float:
    """Likes exclamation marks and contractions."""
    return 1.0 if re.search(r"!|\w'\w", reply) else -1.0


def formal(prompt: str, reply: str) -> float:
    """Likes neither."""
    return -casual(prompt, reply)


def detailed(prompt: str, reply: str) -> float:
    """Likes many words."""
    return -brief(prompt, reply)


USERS: dict[str, Utility] = {
    utility.__name__: utility for utility in (lively, brief, detailed, emoji, curious, casual, formal)
}


@dataclass(frozen=True)
class Row:
    """One policy version as its users found it."""

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
    note: str

    def line(self) -> str:
        """The row in one line, as it is told while the simulation runs."""
        return (
            f"{self.version}: utility {self.utility:+.2f} ({self.low:+.2f} to {self.high:+.2f}), "
            f"frozen {self.frozen:+.2f}, {self.reactions} reactions"
        )


def users(name: str) -> Utility:
    """The utility of built-in users, or the `utility(prompt, reply)` of a Python file."""
    if name in USERS:
        return USERS[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(
            f"--users has value '{name}', which is neither a file nor one of the built-in users ({', '.join(USERS)})"
        )
    try:
        found = runpy.run_path(str(path)).get("utility")
    except Exception as error:  # whatever the user's own file raises
        raise ConfigError(f"--users {name}: the file does not run ({type(error).__name__}: {error}); mend it") from error
    if not callable(found):
        raise ConfigError(f"--users {name}: has no function utility(prompt: str, reply: str) -> float; add it")
    return found


@dataclass(frozen=True)
class People:
    """Who talks: what they like, how often they react, and how often by mistake the other way."""

    utility: Utility
    reaction_rate: float
    noise: float
    seed: int


class Simulation:
    """Rounds of talk -> train -> gate -> swap, with a judgement of every version."""

    def __init__(
        self,
        dialogue: DialogueManager,
        policy: Policy,
        learner: OnlineLearner,
        people: People,
        progress: Progress,
    ):
        self.dialogue = dialogue
        self.policy = policy
        self.learner = learner
        self.people = people
        self.rng = random.Random(people.seed)
        self.progress = progress
        self.rows: list[Row] = []

    async def run(self, rounds: int, messages: int, samples: int, show: Callable[[Row], None]) -> list[Row]:
        """`rounds` times: talk (`messages` exchanges), learn, judge the live version on `samples` answers a prompt."""
        frozen, _ = await self._utilities(BASE, samples)
        self._frozen = mean_interval(frozen, self.people.seed)
        await self._judge(samples, approval=None, kl=0.0, note="the start", show=show)
        for number in range(1, rounds + 1):
            approvals = await self._talk(messages, f"round {number}: talking")
            kl, note = await self._learn()
            approval = sum(approvals) / len(approvals) if approvals else None
            await self._judge(samples, approval, kl, note, show)
        return self.rows

    async def _talk(self, messages: int, stage: str) -> list[bool]:
        """`messages` people say one thing each, and some of them react. Returns the reactions."""
        said = [self.rng.choice(demo.prompts(held_out=False))[0] for _ in range(messages)]
        moods = [(self.rng.random(), self.rng.random(), self.rng.random(), self.rng.randrange(2**31)) for _ in said]
        given: list[bool] = []

        async def one(text: str, mood: tuple[float, float, float, int]) -> None:
            attention, taste, slip, seed = mood
            user = f"user-{seed % 40}"
            place = await self.dialogue.open(Conversation("simulation", channel=new_id()))
            turn = await self.dialogue.respond(Message(place.id, user, text), ReplyOptions(seed=seed))
            if attention < self.people.reaction_rate:
                approves = taste < 1 / (1 + math.exp(-DECISIVENESS * self._utility(text, turn.text)))
                approves ^= slip < self.people.noise
                await self._react(turn, user, approves)
                given.append(approves)

        await self._gather([one(text, mood) for text, mood in zip(said, moods, strict=True)], stage)
        return given

    async def _react(self, turn: Turn, user: str, approves: bool) -> None:
        kind = FeedbackKind.APPROVAL if approves else FeedbackKind.DISAPPROVAL
        await self.dialogue.record_feedback(Feedback(turn.id, user, kind, signal="👍" if approves else "👎"))

    async def _learn(self) -> tuple[float, str]:
        try:
            outcome = await self.learner.step()
        except NothingToLearn as error:
            self.learner.announce(f"nothing learned: {error}")
            return 0.0, str(error)
        kl = outcome["figures"]["kl"] if outcome["passed"] else (self.rows[-1].kl if self.rows else 0.0)
        return kl, "" if outcome["passed"] else f"{outcome['policy']} rejected: {'; '.join(outcome['reasons'])}"

    async def _judge(self, samples: int, approval: float | None, kl: float, note: str, show: Callable[[Row], None]) -> None:
        """True utility of the live version on the held-out prompts, beside that of the frozen one."""
        live, well_formed = await self._utilities(self.policy.version, samples)
        mean, low, high = mean_interval(live, self.people.seed)
        frozen_mean, frozen_low, frozen_high = self._frozen
        row = Row(
            version=self.policy.version,
            reactions=await self.dialogue.store.database.call(self.dialogue.store.reactions),
            utility=mean,
            low=low,
            high=high,
            frozen=frozen_mean,
            frozen_low=frozen_low,
            frozen_high=frozen_high,
            approval=approval,
            kl=kl,
            well_formed=well_formed,
            note=note,
        )
        self.rows.append(row)
        show(row)

    async def _utilities(self, version: str, samples: int) -> tuple[list[float], float]:
        """The mean utility of each held-out prompt, and the share of well-formed answers."""
        asked = [prompt for prompt, _ in demo.prompts(held_out=True)]
        found: dict[str, list[float]] = {prompt: [] for prompt in asked}
        well_formed: list[bool] = []

        async def one(prompt: str, seed: int) -> None:
            prompt_ids = self.dialogue.tracker.tokenizer.prompt_ids([{"role": "user", "content": prompt}])
            reply = await self.policy.reply(prompt_ids, version=version, seed=seed)
            found[prompt].append(self._utility(prompt, reply.text))
            well_formed.append(reply.finish_reason == "stop" and is_well_formed(reply.text))

        seeds = random.Random(self.rng.random())
        work = [one(prompt, seeds.randrange(2**31)) for _ in range(samples) for prompt in asked]
        await self._gather(work, f"judging {version}")
        return [sum(values) / len(values) for values in found.values()], sum(well_formed) / len(well_formed)

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

    def _utility(self, prompt: str, reply: str) -> float:
        value = self.people.utility(prompt, reply)
        if not isinstance(value, int | float) or not -1 <= value <= 1:
            raise ConfigError(f"--users: utility({prompt!r}, …) returned {value!r}; it must return a number in [-1, 1]")
        return float(value)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of a simulation, for its JSON file."""
    first, last = rows[0], rows[-1]
    found: dict[str, Any] = {}
    for name, (value, low, high) in {
        "first_utility": (first.utility, first.low, first.high),
        "last_utility": (last.utility, last.low, last.high),
        "frozen_utility": (last.frozen, last.frozen_low, last.frozen_high),
    }.items():
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    versions = {row.version for row in rows}
    return {
        **found,
        "well_formed": min(row.well_formed for row in rows),
        "versions": len(versions),
        "reactions": last.reactions,
        "kl": last.kl,
        "curve": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Row]) -> Table:
    """The rows of a simulation, by policy version."""
    names = ("version", "reactions", "true utility (95%)", "frozen (95%)", "approval", "KL", "well-formed")
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
        )
    return found


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """The learning curve: true utility on held-out prompts against reactions, beside the frozen control."""
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
