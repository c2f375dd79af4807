"""OnlineLearner: collect -> train -> evaluate -> deploy, whenever there are enough new reactions.

Training runs in a child process (`kibitz train`): the system frees its memory when it ends, and a crash is an exit code. A
failure here never stops the chat (law 9).
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
from bot.wording import count_noun
from learning.judging.judgement import Judgement
from learning.rollout.deployment import Deployment

Announce = Callable[[str], None]
JUDGE_TRIES = 3  # failed tries to judge a waiting version before it is given up; a new reaction comes before each
DATABASE_URL = "KIBITZ_DATABASE_URL"  # passes the database's URL to a training process, because no file may hold it


class OnlineLearner:
    """Turns feedback into deployed versions, one run at a time."""

    def __init__(
        self,
        store: ConversationStore,
        deployment: Deployment,
        config: Config,
        announce: Announce = lambda text: None,
        progress: Progress = lambda stage, done, total: None,
        is_head_proven: Callable[[], bool] = lambda: False,
    ):
        """`is_head_proven` tells whether the reward head is proven, so that a run learns from its labels. The first proof
        starts a run at once.
        """
        self.store = store
        self.deployment = deployment
        self.config = config
        self.announce = announce
        self.progress = progress
        self.is_head_proven = is_head_proven
        self._learned: int | None = None  # reactions that earlier runs learned from
        self._purged = 0
        self._failures = 0  # failed tries to judge the waiting version
        self._tries_from = 0  # reactions that the waiting version needs before the next try

    async def run(self, health: Health | None = None) -> None:
        """Learn forever: check every `learning.check_seconds` for enough new reactions. Failed runs are announced."""
        every = self.config.learning.check_seconds
        await supervise("learning", self._learn_if_enough, health or Health(self.announce), every)

    async def _learn_if_enough(self) -> None:
        said, purged, paused = await self.store.database.call(self._read_counts)
        if self._learned is None:
            self._learned, self._purged = await self._count_learned(), purged
        # Purged versions take what they learned with them: learn again from all that is left.
        self._learned = min(said, self._learned) if purged == self._purged else 0
        self._purged = purged
        if paused or await self.judge_waiting():
            return
        is_enough = said - self._learned >= self.config.learning.distil_every
        if not is_enough and not (said > self._learned and await self._is_proof_new()):
            return
        self._learned = said
        self.announce(f"training on {count_noun(said, 'reaction')}")
        try:
            await self.learn_once()
        except NothingToLearn as error:
            self.announce(f"nothing learned: {error}")
        except KibitzError as error:
            self.announce(f"training failed (the chat is not affected): {error}")

    async def learn_once(self) -> Judgement:
        """Train one version, deploy it if it passes the gate, and return its judgement.

        If the server is unavailable, or this process ends first, `Deployment.watch` deploys it later.
        """
        outcome = await self._run_in_child("--deploy")
        if outcome.passed:
            try:
                await self.deployment.deploy(outcome.policy)
            except ServerUnavailable as error:
                self.announce(f"{outcome.policy} passed and will be deployed when vLLM is available: {error}")
        else:
            self._announce_outcome(outcome)
        return outcome

    async def judge_waiting(self) -> bool:
        """Judge the waiting version if enough reactions came for it. Returns True if there is one: no run starts meanwhile.

        After `learning.wait_reactions` at most it is judged, or given up; after JUDGE_TRIES failed tries it is given up.
        """
        version, came, is_due = await self.store.database.call(self._look_at_waiting)
        if version is None:
            self._failures = self._tries_from = 0
            return False
        if not is_due or came < self._tries_from:
            return True
        self.announce(f"judging {version.name} again with the reactions that it waited for")
        try:
            outcome = await self._run_in_child("--judge")
        except TrainingError as error:
            self._failures += 1
            self._tries_from = came + 1
            self.announce(f"{version.name} cannot be judged (the chat is not affected): {error}")
            if self._failures >= JUDGE_TRIES:
                from learning.judging.waiting import give_up  # imported here because it loads the training libraries

                await self.store.database.call(give_up, self.deployment.registry, version, f"it cannot be judged: {error}")
            return True
        self._failures = self._tries_from = 0
        if outcome.passed:
            self.announce(f"{version.name} waited and passed")
            await self.deployment.deploy_requested()
        else:
            self._announce_outcome(outcome)
        return True

    def _look_at_waiting(self) -> tuple[PolicyVersion | None, int, bool]:
        """Return the waiting version, the number of reactions that came for it, and whether to judge it now."""
        registry = self.deployment.registry
        version = next(reversed(registry.find_waiting()), None)
        if version is None:
            return None, 0, False
        came = self.store.count_reactions(version.drawn_at)
        enough = min(version.awaited_reactions, self.config.learning.wait_reactions)
        return version, came, came >= enough or registry.get_live().name != version.judged_against

    async def _run_in_child(self, option: str) -> Judgement:
        """Train or judge a version in a child process and return its judgement. vLLM sleeps meanwhile if so configured."""
        sleeps = self.config.serving.sleep_while_training
        async with self.deployment.sleeping() if sleeps else contextlib.nullcontext():
            return await train_in_child(self.config, self.progress, option)

    def _announce_outcome(self, outcome: Judgement) -> None:
        verdict = "waits for more reactions" if outcome.waits else "rejected"
        self.announce(f"{outcome.policy} {verdict}: {'; '.join(outcome.reasons)}")

    async def _is_proof_new(self) -> bool:
        """Whether the reward head is proven, and the newest version did not learn from its labels."""
        if not self.is_head_proven():
            return False
        return not (await self.store.database.call(self.deployment.registry.get_newest)).metrics.labels

    def _read_counts(self) -> tuple[int, int, bool]:
        """Return the number of reactions, the number of purged versions, and whether learning is paused."""
        registry = self.deployment.registry
        return self.store.count_reactions(), registry.count(PolicyState.PURGED), registry.is_learning_paused()

    async def _count_learned(self) -> int:
        """Count the reactions that the last run began with, so that a restart does not train on them again.

        Runs of purged versions and of earlier base models do not count.
        """

        def count() -> int:
            registry = self.deployment.registry
            purged, since = registry.find_directories(PolicyState.PURGED), registry.get_base().created_at
            begun = [run["started_at"] for run in registry.list_runs() if run["policy"] not in purged]
            last = max((at for at in begun if at >= since), default=None)
            return 0 if last is None else self.store.count_reactions(until=last)

        return await self.store.database.call(count)


async def train_in_child(config: Config, progress: Progress, option: str) -> Judgement:
    """Run `kibitz train` with an option in a child process and return its version's judgement.

    Raises TrainingError with the child's error message.
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
    for sign in (signal.SIGTERM, signal.SIGKILL):  # not SIGINT, which it ignores if a shell had us ignore it
        if child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(sign)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), 10)
            return
