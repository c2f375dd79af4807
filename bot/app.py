"""The composition root: make and connect the parts of a serving kibitz.

This module imports all three packages. Only the commands import it.
"""

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bot.chat.dialogue import DialogueManager
from bot.chat.reactions import Reactions
from bot.chat.texts import describe_consent, describe_pause, describe_state, describe_status
from bot.chat.tracker import StateTracker
from bot.config import Config, ServingConfig
from bot.data_directory import HEALTH_FILE, lock_directory
from bot.errors import ServingError
from bot.memory.caches import PAUSE_SECONDS, Caches
from bot.memory.recall import Recall, make_recall
from bot.memory.state import LATEST_MESSAGES, derive_state
from bot.models.tokenizer import ChatTokenizer
from bot.output import announce, make_log_progress
from bot.serving.policy import Policy
from bot.serving.readiness import Readiness, make_checks
from bot.serving.vllm_server import VllmServer
from bot.store.conversations import ConversationStore
from bot.store.database import Database
from bot.store.deliveries import Deliveries
from bot.store.erasures import Erasures
from bot.store.forgetting import forget_again, forget_person, remove_purged_files
from bot.store.registry import PolicyRegistry
from bot.store.retention import ERASE_SECONDS, erase_expired
from bot.store.stores import open_stores
from bot.store.users import Users
from bot.supervision import Health, Start, background_tasks, describe_failures, supervise
from bot.types import PolicyVersion
from bot.wording import count_noun
from connectors.access import Access
from connectors.base import Desk, Services
from learning.rollout.deployment import Deployment
from learning.rollout.loop import OnlineLearner

if TYPE_CHECKING:
    from learning.rollout.selector import HeadSelector

Announce = Callable[[str], None]


@dataclass(frozen=True)
class Kibitz:
    """The running parts of a kibitz."""

    config: Config
    database: Database
    store: ConversationStore
    registry: PolicyRegistry
    policy: Policy
    dialogue: DialogueManager
    deployment: Deployment
    server: VllmServer | None
    selector: "HeadSelector | None"
    readiness: Readiness
    health: Health
    start: Start

    def keep_running(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start a task that is restarted whenever it fails, until kibitz stops."""
        self.start(supervise(name, work, self.health))


@contextlib.asynccontextmanager
async def running(config: Config, model: str, tell: Announce, *, may_change_base: bool = False) -> AsyncIterator[Kibitz]:
    """Run a kibitz with its database, vLLM at the live version, and dialogue. Stop everything at the end.

    Raises RegistryError if the versions in the data directory come from another base model. With `may_change_base` the
    new model replaces that one instead, once vLLM has generated a token with it.
    """
    with lock_directory(config.data, "serve"):
        database, store, registry = open_stores(config)
        if not may_change_base:
            registry.check_base(model)
        _finish_forgetting(database, registry, tell)
        recall = make_recall(config.dialogue, config.data, database)
        tokenizer = ChatTokenizer(model, config.policy.template_args)
        tracker = StateTracker(store, tokenizer, recall, config.dialogue, config.policy.context_tokens)
        policy, server = _make_policy(config, model, tokenizer)
        health = Health(tell, config.data / HEALTH_FILE)
        deployment = Deployment(policy, registry, config.serving, config.training, config.gate, tell)
        try:
            if server is not None:
                tell(f"starting vLLM (its log: {server.log_path})")
            async with asyncio.TaskGroup() as group:
                group.create_task(recall.load_embedder())
                group.create_task(_check_reachable(policy, config.serving) if server is None else server.start(policy))
            # Only now that vLLM generates with it.
            base = registry.set_base(model) if may_change_base else registry.ensure_base(model)
            _use_base(registry, policy, base, tell)
            async with background_tasks() as start:
                selector = _make_selector(config, store, tokenizer, recall) if config.learning.enabled else None
                dialogue = DialogueManager(store, tracker, policy, selector, config.serving.candidates)
                readiness = Readiness(make_checks(policy, database, config.data))
                parts = store, registry, policy, dialogue, deployment, server, selector, readiness, health, start
                kibitz = Kibitz(config, database, *parts)
                await _start_tasks(kibitz, recall, tokenizer, tell)
                gc.collect()
                gc.freeze()  # scanning the loaded objects again would stop every answer for 0.3 s
                yield kibitz
        finally:
            await policy.close()
            if server is not None:
                await server.stop()
            recall.close()
            database.close()


def _finish_forgetting(database: Database, registry: PolicyRegistry, tell: Announce) -> None:
    """Forget again what the database still has of forgotten people and messages, after a crash or a restore."""
    if again := forget_again(database, registry):
        found = count_noun(again, "forgotten person or message", "forgotten people and messages")
        tell(f"the database still had {found}; all are forgotten again")
    remove_purged_files(registry)
    database.rebuild(tell)
    database.scrub()


def _make_policy(config: Config, model: str, tokenizer: ChatTokenizer) -> tuple[Policy, VllmServer | None]:
    """Return the policy's client, and our own vLLM (not started yet), or None if the config names a server."""
    serving, policy_config = config.serving, tokenizer.with_thought_tokens(config.policy)
    key, thinks = serving.read_key(), (tokenizer.end_ids, tokenizer.thoughts)
    server = None if serving.url else VllmServer(serving, policy_config, config.training, config.data, model)
    url = serving.url if server is None else server.url
    policy = Policy(url, policy_config, serving.reply_seconds, key, *thinks)
    policy.admin.log_path = "" if server is None else str(server.log_path)
    return policy, server


def _make_selector(config: Config, store: ConversationStore, tokenizer: ChatTokenizer, recall: Recall) -> "HeadSelector":
    """Return what chooses answers by the people's reactions."""
    from learning.data.replay_buffer import ReplayBuffer
    from learning.rollout.selector import HeadSelector

    return HeadSelector(ReplayBuffer(store, tokenizer, config), recall.embedder, config.seed)


def _use_base(registry: PolicyRegistry, policy: Policy, base: PolicyVersion, tell: Announce) -> None:
    """Name the base of new versions to the policy's client, and tell people if it is another one than before."""
    policy.set_base(base.name)
    if foreign := registry.find_foreign():
        changed = f"policy.model was changed: {base.name} is {base.base_model}, and {registry.get_live().name} is live"
        tell(
            f"{changed}; {count_noun(len(foreign), 'version')} of another model can serve only when that model is set again"
        )


async def _start_tasks(kibitz: Kibitz, recall: Recall, tokenizer: ChatTokenizer, tell: Announce) -> None:
    """Load the live version, and start the background tasks."""
    config, health, deployment = kibitz.config, kibitz.health, kibitz.deployment
    if kibitz.server is not None:
        kibitz.start(kibitz.server.watch(kibitz.policy, deployment.restore_live, health))
    await deployment.restore_live()
    kibitz.start(deployment.watch(health=health))
    selector = kibitz.selector
    caches = Caches(Erasures(config.data), recall, tokenizer, [] if selector is None else [selector.forget])
    if selector is not None:
        kibitz.keep_running("reward head", selector.run)
    kibitz.start(supervise("caches", caches.drop_forgotten, health, PAUSE_SECONDS))
    kibitz.keep_running("readiness", kibitz.readiness.watch)
    kibitz.keep_running("embedding", lambda: recall.embed_missing(make_log_progress(tell)))
    expire = partial(erase_expired, kibitz.database, config.privacy.retention_days, caches.drop)
    kibitz.start(supervise("retention", expire, health, ERASE_SECONDS))


async def _check_reachable(policy: Policy, serving: ServingConfig) -> None:
    """Have an external vLLM generate a token. Raises ServingError if it does not."""
    await policy.admin.connect()
    if not await policy.admin.is_ready(serving.reply_seconds):
        raise ServingError(f"the vLLM at {policy.admin.url} generates no token; see its log")


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine. Ctrl-C and SIGTERM cancel it, and then KeyboardInterrupt is raised."""
    if _run_and_collect_stops(main) is not None:
        raise KeyboardInterrupt


def run_until_stopped(main: Coroutine[Any, Any, None]) -> None:
    """As `run`, but one SIGTERM is the normal end of the command. A second signal interrupts it."""
    if _run_and_collect_stops(main) not in (None, [signal.SIGTERM]):
        raise KeyboardInterrupt


def _run_and_collect_stops(main: Coroutine[Any, Any, None]) -> list[int] | None:
    """Run a coroutine. Return the signals that came if it was cancelled, or None if it ended by itself.

    Each SIGINT or SIGTERM cancels it: the first one what it does, the second one its cleaning up. No signal raises an
    exception, because that would come out of whatever the event loop runs at that moment.
    """
    stops: list[int] = []
    usual = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}

    async def guarded() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop(sign: int, _: Any) -> None:
            stops.append(sign)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(task.cancel)

        # Not the loop's own signal handlers: prompt_toolkit removes that of SIGINT.
        for sign, handler in usual.items():
            if handler is not signal.SIG_IGN:  # shells have background commands ignore Ctrl-C
                signal.signal(sign, stop)
        await main

    try:
        asyncio.run(guarded())
    except asyncio.CancelledError:
        return stops
    finally:
        for sign, handler in usual.items():
            signal.signal(sign, handler)
    return None


def make_learner(kibitz: Kibitz) -> OnlineLearner:
    """Return what trains versions from the reactions to a kibitz."""
    is_proven = (lambda: False) if kibitz.selector is None else kibitz.selector.is_proven
    return OnlineLearner(kibitz.store, kibitz.deployment, kibitz.config, announce, is_head_proven=is_proven)


def make_services(kibitz: Kibitz, access: Access) -> Services:
    """Return the services that the connectors of a kibitz share."""
    reactions, users = Reactions(kibitz.config.reactions), Users(kibitz.database, kibitz.config.privacy)
    return Services(kibitz.dialogue, Deliveries(kibitz.database), reactions, access, users, make_desk(kibitz))


def make_desk(kibitz: Kibitz) -> Desk:
    """Return the functions behind the chat commands: status, rollback, privacy and so on."""
    call, users = kibitz.database.call, Users(kibitz.database, kibitz.config.privacy)

    async def status() -> str:
        told = await call(describe_status, kibitz.store, kibitz.registry, kibitz.config.data)
        return "\n".join([told, *describe_failures(kibitz.health.failures)])

    async def rollback() -> str:
        before, after = await call(kibitz.registry.roll_back)
        return f"{before.name} was rolled back; {after.name} answers again in a moment"

    async def pause_learning() -> str:
        return describe_pause(await call(kibitz.registry.toggle_learning))

    async def privacy(platform: str, user: str, choice: str) -> str:
        if choice != "status":
            await call(users.record_consent, platform, user, choice == "on")
            kibitz.dialogue.sampler.notice_feedback()  # what the person said counts now, or no more
        return describe_consent(await call(users.has_consent, platform, user))

    async def forget(platform: str, user: str) -> str:
        erased = await call(forget_person, kibitz.database, kibitz.registry, platform, user)
        return f"{erased}. {describe_consent(False)} Messages in the channels of this platform are yours to delete."

    def failing() -> list[str]:
        return sorted(kibitz.health.failures)

    faults = kibitz.readiness.list_faults
    return Desk(
        lambda turn_id: _explain_turn(kibitz, turn_id), status, rollback, pause_learning, privacy, forget, faults, failing
    )


async def _explain_turn(kibitz: Kibitz, turn_id: str) -> str:
    from learning.data.explanation import explain
    from learning.data.replay_buffer import ReplayBuffer

    buffer = ReplayBuffer(kibitz.store, kibitz.dialogue.tracker.tokenizer, kibitz.config)
    account = await kibitz.database.call(explain, turn_id, buffer, kibitz.registry)
    said = await kibitz.database.call(kibitz.store.read_messages, account.turn.conversation_id, LATEST_MESSAGES)
    known = await asyncio.to_thread(derive_state, said, kibitz.dialogue.tracker.recall.embedder)
    return "\n".join([*account.lines_without_names(), *describe_state(known).splitlines()[:12]])
