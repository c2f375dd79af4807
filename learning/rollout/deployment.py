"""Deployment: a candidate goes live, and what is live is what the server serves.

The order is load -> probe -> promote -> drain -> unload (law 5). The probe asks the server for its log-probabilities of
fixed token ids and compares them with the trainer's. A server holds many adapters and one set of whole weights: where those
change, replies wait for the last answer in flight, for the load and for the probe.

A candidate is rejected where it fails, or where its verdict does not hold any more because another version went live since.
Where the server, or the database, could not be asked, it stays a candidate and is tried again. It knows no training; it
needs a Policy and the registry.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from bot.config import Config
from bot.errors import (
    ConfigError,
    KibitzError,
    ProbeFailed,
    RegistryError,
    ServerUnavailable,
    ServingError,
    VerdictOutdated,
    quote_error,
)
from bot.serving.policy import Policy
from bot.store.registry import PolicyRegistry
from bot.supervision import Health, supervise
from bot.types import Metrics, PolicyState, PolicyVersion, Record
from learning.judging import probe
from learning.models.version_files import discard_weights, find_faults, find_weights_folder, fingerprint, is_whole

Announce = Callable[[str], None]
RETRY_FIRST = 1.0  # seconds until a version that could not be served is tried again; then twice as long each time
RETRY_SECONDS = 600.0  # at most
DEPLOY_TRIES = 5  # of a candidate, while a server that was well goes away or fails in the middle of them


class ProbeResult(Record):
    """What a probe found: the mean distances (nats) of the server's log-probabilities from those that the trainer computed
    of the candidate and of its parent, and how far from the candidate a sound server may be.
    """

    distance: float = Field(validation_alias="probe_distance", serialization_alias="probe_distance")
    from_parent: float = Field(validation_alias="probe_from_parent", serialization_alias="probe_from_parent")
    tolerance: float = Field(validation_alias="probe_tolerance", serialization_alias="probe_tolerance")

    @property
    def passed(self) -> bool:
        """Whether the server serves the candidate: is near it and, the real test, half as far from it as from its parent."""
        return self.distance <= self.tolerance and self.distance <= self.from_parent / 2


@dataclass(frozen=True)
class ServingFailure:
    """A live version that could not be served: why, how long it is left alone, and until when (the loop's clock)."""

    version: str
    reason: str
    pause: float
    until: float


class Deployment:
    """Keeps one vLLM server at the version that the registry calls live."""

    def __init__(self, policy: Policy, registry: PolicyRegistry, config: Config, announce: Announce = lambda text: None):
        self.policy, self.admin = policy, policy.admin
        self.registry = registry
        self.config = config
        self.announce = announce
        self.probed: dict[str, ProbeResult] = {}  # what the last probe of each version found
        self._refused: ServingFailure | None = None
        self._swapping = asyncio.Lock()  # one swap at a time: both the learner and the watcher of rollbacks swap
        self._tries: Counter[str] = Counter()  # of candidates, that ended because the server went away
        self._rejections: dict[str, KibitzError] = {}  # why candidates were rejected here
        self._pause, self._tries_at = 1.0, 0.0  # how long candidates that wait are left alone, and until when

    async def deploy(self, name: str) -> PolicyVersion:
        """Prove a candidate on the server, then make it live. On any doubt it is rejected and the live one stays.

        Raises VerdictOutdated where another version is live than the one that it was judged against, and Unavailable where
        the server could not be asked: then it stays a candidate.
        """
        call = self.registry.database.call
        async with self._swapping:
            version = await call(self.registry.get, name)
            if version.state == PolicyState.LIVE:  # whoever else was asked to was sooner
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
        """Deploy the candidates that are to be deployed, oldest first; people are told of each failure.

        What a crash left behind is among them, and what `kibitz deploy` asked for. Where one must wait for the server, all
        are tried again later, and later each time.
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
        """Deploy or reject a candidate; False where it must wait for the server."""
        async with self._swapping:
            if not await self.admin.is_ready(self.config.serving.reply_seconds):
                return False
        try:
            await self.deploy(version.name)
        except ServerUnavailable as error:
            self._tries[version.name] += 1
            if self._tries[version.name] < DEPLOY_TRIES:
                self.announce(f"{version.name} stays a candidate and is tried again: {error}")
                return False
            await self._reject(version, error)
            self.announce(f"{version.name} is rejected, it could not be proven in {DEPLOY_TRIES} tries: {error}")
        except (ServingError, RegistryError) as error:
            self.announce(f"{version.name} is not deployed: {error}")
        return True

    async def _reject(self, version: PolicyVersion, error: KibitzError) -> None:
        """Reject a candidate; its weights go. One that was purged meanwhile is left as it is."""
        self._rejections[version.name] = error
        found = self.probed[version.name] if isinstance(error, ProbeFailed) else Record()
        with contextlib.suppress(RegistryError):
            metrics = version.metrics | found | Metrics(reasons=[str(error)])
            await self.registry.database.call(self.registry.reject, version.name, metrics)
            await asyncio.to_thread(discard_weights, Path(version.path))

    async def follow_registry(self) -> bool:
        """Bring the server to the registry's live version, if another process changed it; True if something changed.

        A server that is not ours may have been started again: then too.
        """
        async with self._swapping:
            live = await self.registry.database.call(self.registry.get_live)
            before = self.policy.version
            if live.name == before and (not self.config.serving.url or await self.admin.has_version(before)):
                return False
            if self.config.serving.url:
                await self.admin.connect()
            async with self._proving(live):
                self.policy.version = live.name
            if before != live.name:
                await self._retire(before)
        self.announce(f"{live.name} is live")
        return True

    async def watch(self, seconds: float = 1.0, health: Health | None = None) -> None:
        """Follow the registry for ever: a rollback, or a candidate to be deployed, may come from another process."""
        await supervise(
            "deployment", self._follow_and_deploy, health or Health(self.announce), seconds, longest_pause=seconds
        )

    async def _follow_and_deploy(self) -> None:
        """Follow the registry. A version that could not be served is tried again later and later: each try may make
        people wait. Another one is tried at once.
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
            cause = quote_error(error, only_first_line=True)
            reason = f"the live version cannot be served, {self.policy.version} goes on: {cause}"
            pause = min(2 * refused.pause, RETRY_SECONDS) if refused is not None else RETRY_FIRST
            self._refused = ServingFailure(live, reason, pause, clock() + pause)
            raise ServingError(reason) from error
        await self.deploy_requested()

    async def restore_live(self) -> None:
        """After a (re)start of the server: serve the live version again, or the base model where it cannot be proven."""
        async with self._swapping:
            await self.admin.connect()
            if self.admin.weights_version == self.admin.base:
                self.policy.version = self.admin.base
            if self.config.training.weights == "full" and not self.admin.can_replace_weights:
                raise ConfigError(
                    f"config key training.weights has value 'full', but the vLLM at {self.admin.url} does not let its "
                    "weights be changed; start it with VLLM_SERVER_DEV_MODE=1 in its environment, or set "
                    'training.weights = "lora"'
                )
            live = await self.registry.database.call(self.registry.get_live)
            try:
                async with self._proving(live):
                    self.policy.version = live.name
            except ServingError as error:
                async with self._proving(await self.registry.database.call(self.registry.get_base)):
                    self.policy.version = self.admin.base
                self.announce(f"{live.name} cannot be served ({error}); {self.admin.base} answers until it can")

    @contextlib.asynccontextmanager
    async def sleeping(self) -> AsyncIterator[None]:
        """Have vLLM sleep inside: its GPU memory is free, and nobody is answered. Afterwards all it serves is proven again.

        The one exception to laws 5 and 9 (docs/architecture.md): only where serving.sleep_while_training asks for it.
        """
        async with self._swapping:
            async with self.policy.pause_replies(self.config.serving.reply_seconds):
                self.policy.is_asleep = True
            self.announce("vLLM sleeps while a version is trained; nobody is answered until that ends")
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
        """Probe every version that the server holds; one that it serves otherwise than before goes."""
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
                self.announce(
                    f"{name} is not the same after sleeping, {self.admin.base} answers until it can be served: {error}"
                )
                if name in whole:
                    await self._replace_weights(self.admin.base)
                else:
                    await self._unload(name)
                if self.policy.version == name:
                    self.policy.version = self.admin.base

    async def rollback(self) -> PolicyVersion:
        """Take the live version back and serve the one before it."""
        _, live = await self.registry.database.call(self.registry.roll_back)
        await self.follow_registry()
        return live

    @contextlib.asynccontextmanager
    async def _proving(self, version: PolicyVersion) -> AsyncIterator[None]:
        """Inside, the server is known to serve `version`. Where other weights make way for its own, replies wait."""
        whole = not version.is_base and is_whole(Path(version.path))
        wanted = version.name if whole else self.admin.base
        stays = wanted == self.admin.weights_version
        if not stays and not self.admin.can_replace_weights:
            raise ServingError(
                f"{version.name} needs the weights of {wanted}, and this vLLM does not let its own be changed; set "
                'training.weights = "full" (and VLLM_SERVER_DEV_MODE=1 where the server is not started by kibitz)'
            )
        found = await asyncio.to_thread(self._find_faults, version)
        if found:
            raise ServingError(f"{version.name} is not sound: {found[0]}")
        async with contextlib.nullcontext() if stays else self._replacing_weights(wanted):
            if version.name != wanted and version.name not in await self.admin.list_adapters():
                await self.admin.load_adapter(version.name, version.path)
            if not version.is_base:
                await self._probe(version)
            yield

    @contextlib.asynccontextmanager
    async def _replacing_weights(self, name: str) -> AsyncIterator[None]:
        """Inside, nobody is answered and the server holds the whole weights of a version; on an error those before again."""
        before = self.admin.weights_version
        async with self.policy.pause_replies(self.config.serving.reply_seconds):
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
        """Where vLLM finds the whole weights of a version."""
        version = self.registry.get(name)
        if version.is_base:
            return str(Path(version.base_model).absolute()) if Path(version.base_model).is_dir() else version.base_model
        folder = find_weights_folder(Path(version.path))
        if not folder.is_dir():  # vLLM's engine ends where it cannot read them
            raise ServingError(f"the weights of {name} are gone")
        return str(folder)

    def _find_faults(self, version: PolicyVersion) -> list[str]:
        if version.is_base:
            return []
        directory = Path(version.path)
        if not (directory / "manifest.json").is_file():
            return ["its manifest is missing: it was never finished"]
        found = find_faults(directory, version.base_model, self.config.serving.max_lora_rank)
        if not found and fingerprint(directory) != version.sha256:
            found = ["its weights are not those that were registered"]
        return found

    async def _probe(self, version: PolicyVersion) -> None:
        """Raise unless the server computes the trainer's log-probabilities, and not those of the parent."""
        served: list[float] = []
        try:
            places = await asyncio.to_thread(probe.read, Path(version.path))
            for place in places:
                listed = await self.admin.read_next_logprobs(version.name, place.prompt_ids, place.temperature)
                floor = min(listed.values())  # a token that the server does not list is at most as likely as the last
                served += [listed.get(token, floor) for token in place.tokens]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ServingError(f"{version.name} has no readable probe ({error!r}); train it again") from error
        if not served:
            raise ServingError(f"{version.name} carries an empty probe; train it again")
        found = ProbeResult(
            distance=probe.mean_distance(served, [one for place in places for one in place.candidate]),
            from_parent=probe.mean_distance(served, [one for place in places for one in place.parent]),
            tolerance=probe.compute_distances(places).tolerance(self.config.gate.probe_tolerance),
        )
        self.probed[version.name] = found
        if not found.passed:
            raise ProbeFailed(
                f"{version.name} failed its probe: the server's log-probabilities are {found.distance:.4f} nats from the "
                f"trainer's (tolerance {found.tolerance:.4f}) and {found.from_parent:.4f} from its parent's"
            )

    async def _retire(self, name: str) -> None:
        """Wait for the last answer of a version that is no longer live, then let the server forget it."""
        if name != self.admin.base and await self.policy.drain(name):
            await self._unload(name)

    async def _unload(self, name: str) -> None:
        """Let the server forget an adapter; one that is away is given none but the live one when it comes back."""
        with contextlib.suppress(ServerUnavailable):
            if name in await self.admin.list_adapters():
                await self.admin.unload_adapter(name)
