"""OnlineLearner: collect -> train -> evaluate -> deploy, whenever enough has been said.

Training runs in a child process (`kibitz train`): its memory comes back when it ends, and a crash is an exit code. The
chat goes on whatever happens here (law 9).
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable

from bot.config import Config, DatabaseConfig, LogConfig
from bot.errors import KibitzError, NothingToLearn, ServerUnavailable, TrainingError
from bot.serving import children
from bot.store.conversations import ConversationStore
from bot.supervision import Health, supervise
from bot.types import PolicyState, PolicyVersion, Progress
from learning.judging.judgement import Judgement
from learning.rollout.deployment import Deployment

Announce = Callable[[str], None]
JUDGE_TRIES = 3  # to judge a version that waits, while that fails; each after another reaction
DATABASE_URL = "KIBITZ_DATABASE_URL"  # the variable that tells a training process the database: its URL is in no file


class OnlineLearner:
    """Turns feedback into deployed versions, one run at a time."""

    def __init__(
        self,
        store: ConversationStore,
        deployment: Deployment,
        config: Config,
        announce: Announce = lambda text: None,
        progress: Progress = lambda stage, done, total: None,
    ):
        self.store = store
        self.deployment = deployment
        self.config = config
        self.announce = announce
        self.progress = progress
        self._learned: int | None = None  # how many reactions the runs so far learned from
        self._purged = 0
        self._failures = 0  # to judge the version that waits
        self._tries_from = 0  # how many reactions must have come for it until the next try

    async def run(self, health: Health | None = None) -> None:
        """Learn for ever: look every `learning.check_seconds` whether enough is new. A failed run is announced."""
        every = self.config.learning.check_seconds
        await supervise("learning", self._learn_if_enough, health or Health(self.announce), every)

    async def _learn_if_enough(self) -> None:
        said, purged, paused = await self.store.database.call(self._read_counts)
        if self._learned is None:  # the first look
            self._learned, self._purged = await self._count_learned(), purged
        # Where versions were withdrawn because somebody was forgotten, the rest is learned anew.
        self._learned = min(said, self._learned) if purged == self._purged else 0
        self._purged = purged
        if paused or await self.judge_waiting() or said - self._learned < self.config.learning.min_reactions:
            return
        self._learned = said
        self.announce(f"training on {said} reactions")
        try:
            await self.learn_once()
        except NothingToLearn as error:
            self.announce(f"nothing learned: {error}")
        except KibitzError as error:
            self.announce(f"learning failed, the chat goes on: {error}")

    async def learn_once(self) -> Judgement:
        """One round; returns what became of its version. A candidate that did not pass the gate is not deployed.

        One that passed is deployed now, or by `Deployment.watch` where that fails for a while or this process ends here.
        """
        outcome = await self._run_in_child("--deploy")
        if outcome.passed:
            try:
                await self.deployment.deploy(outcome.policy)
            except ServerUnavailable as error:
                self.announce(f"{outcome.policy} passed, and is deployed as soon as vLLM can be asked: {error}")
        else:
            self._announce_outcome(outcome)
        return outcome

    async def judge_waiting(self) -> bool:
        """Judge the version that waits, where enough may have come; True where there is one, which holds the next run back.

        It does so for `learning.wait_reactions` at most: then it is judged as it is, or given up. One that cannot be judged
        is given up after TRIES.
        """
        version, came, is_due = await self.store.database.call(self._look_at_waiting)
        if version is None:
            self._failures = self._tries_from = 0
            return False
        if not is_due or came < self._tries_from:
            return True
        self.announce(f"looking at what was said of {version.name}, which waits")
        try:
            outcome = await self._run_in_child("--judge")
        except TrainingError as error:
            self._failures += 1
            self._tries_from = came + 1
            self.announce(f"{version.name} cannot be judged, the chat goes on: {error}")
            if self._failures >= JUDGE_TRIES:
                from learning.judging.waiting import give_up  # a command that only serves need not load it

                await self.store.database.call(give_up, self.deployment.registry, version, f"it cannot be judged: {error}")
            return True
        self._failures = self._tries_from = 0
        if outcome.passed:
            self.announce(f"{version.name} has waited, and passed")
            await self.deployment.deploy_requested()
        else:
            self._announce_outcome(outcome)
        return True

    def _look_at_waiting(self) -> tuple[PolicyVersion | None, int, bool]:
        """The version that waits, how many reactions have come for it, and whether to look at its evidence."""
        registry = self.deployment.registry
        version = next(reversed(registry.find_waiting()), None)
        if version is None:
            return None, 0, False
        came = self.store.count_reactions(version.drawn_at)
        enough = min(version.awaited_reactions, self.config.learning.wait_reactions)
        return version, came, came >= enough or registry.get_live().name != version.judged_against

    async def _run_in_child(self, option: str) -> Judgement:
        """Train a version, or judge one, in a child process; what became of it."""
        sleeps = self.config.serving.sleep_while_training
        async with self.deployment.sleeping() if sleeps else contextlib.nullcontext():
            return await train_in_child(self.config, self.progress, option)

    def _announce_outcome(self, outcome: Judgement) -> None:
        verdict = "waits for more reactions" if outcome.waits else "rejected"
        self.announce(f"{outcome.policy} {verdict}: {'; '.join(outcome.reasons)}")

    def _read_counts(self) -> tuple[int, int, bool]:
        """How many reactions there are, how many versions were purged, and whether learning is paused."""
        registry = self.deployment.registry
        return self.store.count_reactions(), registry.count(PolicyState.PURGED), registry.is_learning_paused()

    async def _count_learned(self) -> int:
        """How many reactions there were when the last run began, so that a restart does not train again on them.

        A new base model learns from all of them, and so does whoever lost what was learned, because somebody was forgotten.
        """

        def count() -> int:
            registry = self.deployment.registry
            purged, since = registry.find_directories(PolicyState.PURGED), registry.get_base().created_at
            begun = [run["started_at"] for run in registry.list_runs() if run["policy"] not in purged]
            last = max((at for at in begun if at >= since), default=None)
            return 0 if last is None else self.store.count_reactions(until=last)

        return await self.store.database.call(count)


async def train_in_child(config: Config, progress: Progress, option: str) -> Judgement:
    """Run `kibitz train` with an option as a child process and return what became of the version.

    Raises TrainingError with the child's own line.
    """
    resolved = config.data / "train-config.json"
    handed = config.model_copy(update={"database": DatabaseConfig(url_env=DATABASE_URL), "log": LogConfig()})
    handed.save(resolved)
    child = await children.start(
        *[sys.executable, "-m", "bot", "train", "--config", str(resolved), option, "--progress", "json"],
        niceness=children.TRAINING_NICENESS,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", DATABASE_URL: config.database_url},
        limit=2**24,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    errors = asyncio.create_task(child.stderr.read())
    outcome: Judgement | None = None
    try:
        async for line in child.stdout:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if "outcome" in row:
                    outcome = Judgement(**row["outcome"])
                elif "nothing_to_learn" in row:
                    raise NothingToLearn(row["nothing_to_learn"])
                else:
                    progress(row["stage"], row["done"], row["total"])
        code = await child.wait()
    finally:
        await _stop(child)
    said = (await errors).decode(errors="replace").strip().splitlines()
    last = said[-1].removeprefix("kibitz: ") if said else f"the training process ended with code {code}"
    if code != 0 or outcome is None:
        advice = "; lower training.max_length or serving.memory_share" if "OutOfMemoryError" in last else ""
        raise TrainingError(last + advice)
    return outcome


async def _stop(child: asyncio.subprocess.Process) -> None:
    for sign in (signal.SIGINT, signal.SIGKILL):
        if child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(sign)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), 10)
            return
