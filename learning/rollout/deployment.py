"""Deployment: make candidates live, and keep the server on the live version.

The order is load -> probe -> promote -> drain -> unload (law 5). The probe asks the server for its log-probabilities of
fixed token ids and compares them with the trainer's. A server holds many adapters but only one set of whole weights: to
replace those, new replies wait until the answers in flight have ended and the new weights are loaded and probed.

A candidate is rejected if it fails, or if another version went live since its verdict. If the server or the database cannot
be reached, it stays a candidate and is tried again. Deployment does not depend on training.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from bot.config import GateConfig, ServingConfig, TrainingConfig
from bot.errors import (
    ConfigError,
    KibitzError,
    ProbeFailed,
    RegistryError,
    ServerUnavailable,
    ServingError,
    VerdictOutdated,
    quote_first_line,
)
from bot.records import Record
from bot.serving.policy import Policy
from bot.store.registry import PolicyRegistry
from bot.store.weights import discard_weights
from bot.supervision import Health, supervise
from bot.types import Metrics, PolicyState, PolicyVersion
from learning.judging import probe
from learning.models.version_files import find_faults, find_weights_folder, fingerprint, is_whole

Announce = Callable[[str], None]
RETRY_FIRST = 1.0  # seconds before a version that could not be served is tried again; each try doubles the pause
RETRY_SECONDS = 600.0  # the longest pause
DEPLOY_TRIES = 5  # tries of a candidate during which a ready server became unavailable, before it is rejected


class ProbeResult(Record):
    """The result of a probe, in nats. `distance` and `from_parent` are the mean distances of the server's log-probabilities
    from the trainer's for the candidate and for its parent. `tolerance` is the largest `distance` allowed.
    """

    distance: float = Field(validation_alias="probe_distance", serialization_alias="probe_distance")
    from_parent: float = Field(validation_alias="probe_from_parent", serialization_alias="probe_from_parent")
    tolerance: float = Field(validation_alias="probe_tolerance", serialization_alias="probe_tolerance")

    @property
    def passed(self) -> bool:
        """Whether the server serves the candidate: it is within the tolerance, and at most half as far from the candidate as
        from its parent (the test that detects other weights).
        """
        return self.distance <= self.tolerance and self.distance <= self.from_parent / 2


@dataclass(frozen=True)
class ServingFailure:
    """A live version that could not be served: the reason, the pause before the next try (s), and when the pause ends
    (the event loop's clock).
    """

    version: str
    reason: str
    pause: float
    until: float


class Deployment:
    """Keeps one vLLM server on the version that the registry calls live."""

    def __init__(
        self,
        policy: Policy,
        registry: PolicyRegistry,
        serving: ServingConfig,
        training: TrainingConfig,
        gate: GateConfig,
        announce: Announce = lambda text: None,
    ):
        self.policy, self.admin = policy, policy.admin
        self.registry = registry
        self.serving, self.training, self.gate = serving, training, gate
        self.announce = announce
        self.probed: dict[str, ProbeResult] = {}  # the last probe of each version
        self._refused: ServingFailure | None = None
        self._swapping = asyncio.Lock()  # one swap at a time: the learner swaps versions, and so does `watch`
        self._tries: Counter[str] = Counter()  # per candidate: tries that ended because the server became unavailable
        self._rejections: dict[str, KibitzError] = {}  # per candidate: why this process rejected it
        self._pause, self._tries_at = 1.0, 0.0  # the pause before candidates are tried again (s), and when it ends

    async def deploy(self, name: str) -> PolicyVersion:
        """Prove a candidate on the server, then make it live. If that fails, the live version stays.

        Raises ServingError if the server does not serve the candidate, and VerdictOutdated if another version is live than
        the one it was judged against; both reject it. Raises ServerUnavailable if the server cannot be reached: it stays a
        candidate.
        """
        call = self.registry.database.call
        async with self._swapping:
            version = await call(self.registry.get, name)
            if version.state == PolicyState.LIVE:  # another caller deployed it first
                return version
            if version.state != PolicyState.CANDIDATE:
                raise self._rejections.get(name) or RegistryError(
                    f"{name} is {version.state}: only a candidate can be deployed"
                )
            before = self.policy.version
            try:
                live = await call(self.registry.get_live)
                if live.name != version.judged_against:
                    raise VerdictOutdated(name, version.judged_against, live.name)
                async with self._proving(version):
                    metrics = version.metrics | self.probed[name]
                    promoted = await call(self.registry.promote, name, metrics, version.judged_against)
                    self.policy.version = name
            except Exception as error:
                await self._unload(name)
                if isinstance(error, ServingError | VerdictOutdated) and not isinstance(error, ServerUnavailable):
                    await self._reject(version, error)
                raise
            await self._retire(before)
        self.announce(f"{name} is live")
        return promoted

    async def deploy_requested(self) -> None:
        """Deploy the requested candidates, oldest first, and announce each failure.

        Requests come from `kibitz deploy`, and from runs that ended before their candidate was deployed. If the server is
        unavailable, all are tried again after a pause that grows with each try.
        """
        clock = asyncio.get_running_loop().time
        if clock() < self._tries_at:
            return
        for version in await self.registry.database.call(self.registry.find_requested):
            if not await self._try_to_deploy(version):
                self._tries_at = clock() + self._pause
                self._pause = min(2 * self._pause, RETRY_SECONDS)
                return
        self._pause = 1.0

    async def _try_to_deploy(self, version: PolicyVersion) -> bool:
        """Deploy or reject a candidate. Returns False if it must wait for the server."""
        async with self._swapping:
            if not await self.admin.is_ready(self.serving.reply_seconds):
                return False
        try:
            await self.deploy(version.name)
        except ServerUnavailable as error:
            self._tries[version.name] += 1
            if self._tries[version.name] < DEPLOY_TRIES:
                self.announce(f"{version.name} could not be deployed and will be tried again: {error}")
                return False
            await self._reject(version, error)
            self.announce(f"{version.name} is rejected: it could not be deployed in {DEPLOY_TRIES} tries: {error}")
        except (ServingError, RegistryError) as error:
            self.announce(f"{version.name} is not deployed: {error}")
        return True

    async def _reject(self, version: PolicyVersion, error: KibitzError) -> None:
        """Reject a candidate and delete its weights. One that was purged meanwhile is left as it is."""
        self._rejections[version.name] = error
        found = self.probed[version.name] if isinstance(error, ProbeFailed) else Record()
        with contextlib.suppress(RegistryError):
            metrics = version.metrics | found | Metrics(reasons=[str(error)])
            await self.registry.database.call(self.registry.reject, version.name, metrics)
            await asyncio.to_thread(discard_weights, Path(version.path))

    async def follow_registry(self) -> bool:
        """Serve the registry's live version, if another process changed it. Returns True if something changed.

        A server that kibitz did not start may have restarted without the version; it is loaded again.
        """
        async with self._swapping:
            live = await self.registry.database.call(self.registry.get_live)
            before = self.policy.version
            if live.name == before and (not self.serving.url or await self.admin.has_version(before)):
                return False
            if self.serving.url:
                await self.admin.connect()
            async with self._proving(live):
                self.policy.version = live.name
            if before != live.name:
                await self._retire(before)
        self.announce(f"{live.name} is live")
        return True

    async def watch(self, seconds: float = 1.0, health: Health | None = None) -> None:
        """Follow the registry forever: another process may roll back, or request a deployment."""
        await supervise(
            "deployment", self._follow_and_deploy, health or Health(self.announce), seconds, longest_pause=seconds
        )

    async def _follow_and_deploy(self) -> None:
        """Follow the registry, then deploy requested candidates. A version that could not be served is tried again after a
        pause that doubles, because each try may make people wait; another version is tried at once.
        """
        live = (await self.registry.database.call(self.registry.get_live)).name
        clock = asyncio.get_running_loop().time
        refused = self._refused if self._refused is not None and self._refused.version == live else None
        if refused is not None and clock() < refused.until:
            raise ServingError(refused.reason)
        try:
            await self.follow_registry()
            self._refused = None
        except Exception as error:
            cause = quote_first_line(error)
            reason = f"the live version cannot be served, {self.policy.version} still answers: {cause}"
            pause = min(2 * refused.pause, RETRY_SECONDS) if refused is not None else RETRY_FIRST
            self._refused = ServingFailure(live, reason, pause, clock() + pause)
            raise ServingError(reason) from error
        await self.deploy_requested()

    async def restore_live(self) -> None:
        """Serve the live version after a (re)start of the server, or the base model if the live version fails.

        Raises ConfigError if `training.weights` is "full" and the server does not allow its weights to be replaced.
        """
        async with self._swapping:
            await self.admin.connect()
            if self.admin.weights_version == self.admin.base:
                self.policy.version = self.admin.base
            if self.training.weights == "full" and not self.admin.can_replace_weights:
                raise ConfigError(
                    f"config key training.weights has value 'full', but the vLLM at {self.admin.url} does not allow its "
                    "weights to be replaced; start it with VLLM_SERVER_DEV_MODE=1 in its environment, or set "
                    'training.weights = "lora"'
                )
            live = await self.registry.database.call(self.registry.get_live)
            try:
                async with self._proving(live):
                    self.policy.version = live.name
            except ServingError as error:
                async with self._proving(await self.registry.database.call(self.registry.get_base)):
                    self.policy.version = self.admin.base
                self.announce(f"{live.name} cannot be served ({error}); {self.admin.base} answers instead")

    @contextlib.asynccontextmanager
    async def sleeping(self) -> AsyncIterator[None]:
        """Put vLLM to sleep for the block, which frees its GPU memory; nobody is answered. Probe all versions afterwards.

        The one exception to laws 5 and 9 (docs/architecture.md), used only with `serving.sleep_while_training`.
        """
        async with self._swapping:
            async with self.policy.pause_replies(self.serving.reply_seconds):
                self.policy.is_asleep = True
            self.announce("vLLM sleeps while a version is trained; nobody is answered until the training ends")
            try:
                await self.admin.sleep()
                try:
                    yield
                finally:
                    await self.admin.wake()
                    await self._prove_again()
            finally:
                self.policy.is_asleep = False
            self.announce(f"vLLM is awake; {self.policy.version} answers again")

    async def _prove_again(self) -> None:
        """Probe every version that the server holds, and unload each one that fails."""
        call = self.registry.database.call
        whole = (
            {self.admin.weights_version}
            if self.admin.weights_version and self.admin.weights_version != self.admin.base
            else set()
        )
        for name in sorted({*await self.admin.list_adapters(), *whole}):
            try:
                await self._probe(await call(self.registry.get, name))
            except ServingError as error:
                self.announce(f"{name} is not the same after sleeping, {self.admin.base} answers instead: {error}")
                if name in whole:
                    await self._replace_weights(self.admin.base)
                else:
                    await self._unload(name)
                if self.policy.version == name:
                    self.policy.version = self.admin.base

    async def rollback(self) -> PolicyVersion:
        """Roll the live version back, and serve and return the one before it."""
        _, live = await self.registry.database.call(self.registry.roll_back)
        await self.follow_registry()
        return live

    @contextlib.asynccontextmanager
    async def _proving(self, version: PolicyVersion) -> AsyncIterator[None]:
        """Load and probe a version; in the block, the server serves it. Replies wait if whole weights are replaced.

        Raises ServingError.
        """
        whole = not version.is_base and is_whole(Path(version.path))
        wanted = version.name if whole else self.admin.base
        stays = wanted == self.admin.weights_version
        if not stays and not self.admin.can_replace_weights:
            raise ServingError(
                f"{version.name} needs the weights of {wanted}, but this vLLM does not allow its weights to be replaced; "
                'set training.weights = "full" (and VLLM_SERVER_DEV_MODE=1 if kibitz does not start the server)'
            )
        found = await asyncio.to_thread(self._find_faults, version)
        if found:
            raise ServingError(f"{version.name} cannot be loaded: {found[0]}")
        async with contextlib.nullcontext() if stays else self._replacing_weights(wanted):
            if version.name != wanted and version.name not in await self.admin.list_adapters():
                await self.admin.load_adapter(version.name, version.path)
            if not version.is_base:
                await self._probe(version)
            yield

    @contextlib.asynccontextmanager
    async def _replacing_weights(self, name: str) -> AsyncIterator[None]:
        """Pause replies and load the whole weights of a version for the block. An error restores the weights before it."""
        before = self.admin.weights_version
        async with self.policy.pause_replies(self.serving.reply_seconds):
            try:
                await self._replace_weights(name)
                yield
            except BaseException:
                if before is not None:
                    await self._replace_weights(before)
                raise

    async def _replace_weights(self, name: str) -> None:
        await self.admin.replace_weights(name, await self.registry.database.call(self._find_weights_source, name))

    def _find_weights_source(self, name: str) -> str:
        """Return the path, or hub name, from which vLLM loads the whole weights of a version."""
        version = self.registry.get(name)
        if version.is_base:
            return str(Path(version.base_model).absolute()) if Path(version.base_model).is_dir() else version.base_model
        folder = find_weights_folder(Path(version.path))
        if not folder.is_dir():  # vLLM's engine ends if it cannot read them
            raise ServingError(f"the weights of {name} are missing: no directory {folder}; restore it, or roll back")
        return str(folder)

    def _find_faults(self, version: PolicyVersion) -> list[str]:
        if version.is_base:
            return []
        directory = Path(version.path)
        if not (directory / "manifest.json").is_file():
            return ["manifest.json is missing, so its training run did not finish"]
        found = find_faults(directory, version.base_model, self.serving.max_lora_rank)
        if not found and fingerprint(directory) != version.sha256:
            found = ["its weights differ from those that were registered"]
        return found

    async def _probe(self, version: PolicyVersion) -> None:
        """Raise ProbeFailed unless the server's log-probabilities are the trainer's, and not the parent's.

        Raises ServingError if the version's probe file cannot be used.
        """
        served: list[float] = []
        try:
            places = await asyncio.to_thread(probe.read, Path(version.path))
            for place in places:
                listed = await self.admin.read_next_logprobs(version.name, place.prompt_ids, place.temperature)
                floor = min(listed.values())  # an unlisted token is at most as likely as the last listed one
                served += [listed.get(token, floor) for token in place.tokens]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServingError(f"{version.name} has no readable probe ({error!r}); train it again") from error
        if not served:
            raise ServingError(f"{version.name} has an empty probe; train it again")
        found = ProbeResult(
            distance=probe.mean_distance(served, [one for place in places for one in place.candidate]),
            from_parent=probe.mean_distance(served, [one for place in places for one in place.parent]),
            tolerance=probe.compute_distances(places).tolerance(self.gate.probe_tolerance),
        )
        self.probed[version.name] = found
        if not found.passed:
            raise ProbeFailed(
                f"{version.name} failed its probe: the server's log-probabilities are {found.distance:.4f} nats from the "
                f"trainer's (tolerance {found.tolerance:.4f}) and {found.from_parent:.4f} from its parent's"
            )

    async def _retire(self, name: str) -> None:
        """Wait for the last answer of a version that is no longer live, then unload it."""
        if name != self.admin.base and await self.policy.drain(name):
            await self._unload(name)

    async def _unload(self, name: str) -> None:
        """Unload an adapter. A server that is away needs no unloading: after its restart only the live version is loaded."""
        with contextlib.suppress(ServerUnavailable):
            if name in await self.admin.list_adapters():
                await self.admin.unload_adapter(name)
