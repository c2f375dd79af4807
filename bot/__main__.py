"""The composition root: the only module that imports all three packages. Parts are made and joined here, nowhere else.

Run: ``kibitz COMMAND`` or ``python -m bot COMMAND``.
"""

import asyncio
import contextlib
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bot import cli, doctor_command
from bot.cli import ConfigFile, DataDir, JsonFile, PlotFile, Seed, announce, app, bench, configured, console
from bot.config import AccessConfig, Config, DatabaseConfig
from bot.conversations import ConversationStore
from bot.data_directory import held, is_held
from bot.database import Database
from bot.deliveries import Deliveries
from bot.dialogue import DialogueManager
from bot.errors import KibitzError
from bot.forgetting import forget_person, remove_purged
from bot.policy import Policy
from bot.registry import BASE, PolicyRegistry
from bot.state import derived
from bot.tokenizer import ChatTokenizer
from bot.tracker import StateTracker
from bot.users import Users
from bot.vllm_server import VllmServer
from connectors.access import Access
from connectors.base import Connector, Desk, Shared
from connectors.reactions import Reactions
from learning.commands import with_model
from learning.deployment import Deployment
from learning.loop import OnlineLearner

__all__ = ["doctor_command", "main"]  # importing a module of commands adds them

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

Announce = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Kibitz:
    """The running parts of one kibitz."""

    config: Config
    database: Database
    store: ConversationStore
    registry: PolicyRegistry
    policy: Policy
    dialogue: DialogueManager
    deployment: Deployment
    server: VllmServer | None


@contextlib.asynccontextmanager
async def running(config: Config, model: str, tell: Announce) -> AsyncIterator[Kibitz]:
    """A kibitz that serves: database, vLLM at the live version, dialogue. Everything is stopped at the end."""
    with held(config.data, "serve"):
        database, store, registry = cli.opened(config)
        registry.ensure_base(model)
        remove_purged(registry)
        recall = cli.recall(config, database)
        tracker = StateTracker(store, ChatTokenizer(model), recall, config.dialogue, config.policy.context_tokens)
        key = os.environ.get(config.serving.api_key_env, "none") if config.serving.api_key_env else "none"
        server = None if config.serving.url else VllmServer(config, model)
        url = config.serving.url if server is None else server.url
        policy = Policy(url, config.policy, config.serving.reply_seconds, key)
        deployment = Deployment(policy, registry, config, tell)
        watchers: list[asyncio.Task[None]] = []
        try:
            await recall.ready()
            if server is not None:
                tell(f"starting vLLM (its log: {server.log})")
                await server.start(policy)
                watchers.append(asyncio.create_task(server.watch(policy, deployment.restore, tell)))
            await deployment.restore()
            watchers.append(asyncio.create_task(deployment.watch()))
            watchers.append(asyncio.create_task(recall.catch_up(cli.tenths(tell))))
            dialogue = DialogueManager(store, tracker, policy)
            gc.collect()
            gc.freeze()  # what was loaded stays: to look through it again would stop every answer for 0.3 s
            yield Kibitz(config, database, store, registry, policy, dialogue, deployment, server)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            await policy.close()
            if server is not None:
                await server.stop()
            recall.close()
            database.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine; SIGTERM ends it as Ctrl-C does."""

    async def guarded() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await main

    try:
        asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@app.command()
def chat(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Talk in the terminal; learning goes on in the background."""
    from connectors.terminal import Terminal

    found, model = with_model(configured(config, data_dir, seed))

    async def main() -> None:
        async with running(found, model, announce) as kibitz:
            terminal = Terminal(kibitz.dialogue, desk(kibitz))
            kibitz.deployment.announce = terminal.announce
            learner = OnlineLearner(kibitz.store, kibitz.deployment, found, terminal.announce)
            learning = asyncio.create_task(learner.run()) if found.learning.enabled else None
            try:
                await terminal.run()
            finally:
                if learning is not None:
                    learning.cancel()
                    await asyncio.gather(learning, return_exceptions=True)

    run(main())


@app.command()
def serve(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Serve and learn until stopped (Ctrl-C or SIGTERM)."""
    found = configured(config, data_dir, seed)
    made = _connectors(found)
    found, model = with_model(found)

    async def main() -> None:
        async with running(found, model, announce) as kibitz:
            announce(f"serving {kibitz.policy.version}; vLLM answers at {kibitz.policy.url}")
            connectors = [make(kibitz) for make in made]
            jobs = [asyncio.create_task(_kept(connector)) for connector in connectors]
            if found.learning.enabled:
                jobs.append(asyncio.create_task(OnlineLearner(kibitz.store, kibitz.deployment, found, announce).run()))
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.gather(*(connector.stop() for connector in connectors), return_exceptions=True)
                for job in jobs:
                    job.cancel()
                await asyncio.gather(*jobs, return_exceptions=True)

    run(main())


def _connectors(config: Config) -> list[Callable[[Kibitz], Connector]]:
    """What makes each connector that the config turns on. Tokens and addresses are looked at now, before anything starts."""
    from connectors.discord import Discord, token
    from connectors.slack import Secrets, Slack
    from connectors.web import Door, Web

    access = Access(config.access)
    made: list[Callable[[Kibitz], Connector]] = []
    if config.discord.token_env:
        bot_token = token(config.discord)
        made.append(lambda kibitz: Discord(shared(kibitz, access), config.discord, bot_token))
    if config.slack.bot_token_env or config.slack.app_token_env or config.slack.signing_secret_env:
        secrets = Secrets.of(config.slack)
        made.append(lambda kibitz: Slack(shared(kibitz, access), config.slack, secrets))
    if config.web.enabled:
        door = Door.open(config.web)
        announce(f"chat and API: {door.url}")
        made.append(lambda kibitz: Web(shared(kibitz, access), door))
    return made


def shared(kibitz: Kibitz, access: Access) -> Shared:
    """What the chat platforms of one kibitz share."""
    reactions, users = Reactions(kibitz.config.reactions), Users(kibitz.database, kibitz.config.privacy)
    return Shared(kibitz.dialogue, Deliveries(kibitz.database), reactions, access, users, desk(kibitz))


async def _kept(connector: Connector) -> None:
    """Run a connector; what ends it ends no other, and is told."""
    try:
        await connector.run()
    except KibitzError as error:
        announce(f"{connector.name}: {error}")


def desk(kibitz: Kibitz) -> Desk:
    """What people may ask about this kibitz, and for themselves."""
    call, users = kibitz.database.call, Users(kibitz.database, kibitz.config.privacy)

    async def status() -> str:
        return await call(cli.status_text, kibitz.store, kibitz.registry)

    async def rollback() -> str:
        before, after = await call(kibitz.registry.rollback)
        return f"{before.name} is taken back; {after.name} answers again in a moment"

    async def pause_learning() -> str:
        return cli.pause_text(await call(kibitz.registry.pause_learning))

    async def privacy(platform: str, user: str, choice: str) -> str:
        if choice != "status":
            await call(users.decide, platform, user, choice == "on")
        return cli.privacy_text(await call(users.consents, platform, user))

    async def forget(platform: str, user: str) -> str:
        erased = await call(forget_person, kibitz.database, kibitz.registry, platform, user)
        return f"{erased}. {cli.privacy_text(False)} What stands in the channels of this platform is yours to delete."

    return Desk(lambda turn_id: _why(kibitz, turn_id), status, rollback, pause_learning, privacy, forget)


async def _why(kibitz: Kibitz, turn_id: str) -> str:
    from learning.rewards import reward

    told = await kibitz.dialogue.explain(turn_id)
    turn = told.turn
    after = await kibitz.database.call(kibitz.dialogue.followups.of, turn_id)
    earned = reward(told.feedback, turn.asker_id, kibitz.config.rewards, after[0] if after else None)
    teachers = [row.id for row in told.feedback], [one.message_id for one in after]
    used = await kibitz.database.call(kibitz.registry.runs_that_used, *teachers)
    lines = [
        f"answered by {turn.policy_version} in {turn.latency_ms:.0f} ms, {turn.finish_reason}",
        f"prompt {len(turn.prompt_ids or ())} tokens, answer {len(turn.completion_ids or ())} tokens, "
        f"log-probability {sum(turn.logprobs or ()):.2f}, sampled with {turn.sampling}",
        f"reward {earned.value:+.2f} from {len(earned.opinions)} people" if earned else "no reward yet",
    ]
    lines += [f"reminded of: {message.text[:200]}" for message in told.remembered]
    lines += [f"what was said next: {one.kind} ({one.chances[one.kind]:.2f})" for one in after]
    said = await kibitz.database.call(kibitz.store.messages, turn.conversation_id)
    known = await asyncio.to_thread(derived, said, kibitz.dialogue.tracker.recall.embedder)
    lines += cli.state_text(known).splitlines()[:12]
    return "\n".join([*lines, f"taught {', '.join(used)}" if used else "has taught nothing yet"])


@app.command()
def simulate(
    users: Annotated[str, typer.Option(help="Built-in users, or a file with utility(prompt, reply).")] = "lively",
    rounds: Annotated[int, typer.Option(min=1)] = 6,
    messages: Annotated[int, typer.Option(min=1, help="Exchanges a round.")] = 240,
    reaction_rate: Annotated[float, typer.Option(min=0, max=1, help="How often a user reacts.")] = 0.3,
    noise: Annotated[float, typer.Option(min=0, max=1, help="How often a reaction is the wrong one.")] = 0.1,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each held-out prompt when judging.")] = 3,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Simulated users with hidden preferences talk, react, and are learned from."""
    from learning import simulation

    found = configured(config, data_dir, seed)
    cli.check_writable(json_file, plot)
    utility = simulation.users(users)
    found, model = with_model(found)
    rows: list[simulation.Row] = []

    async def main() -> None:
        async with running(found, model, announce) as kibitz:
            with cli.progress_bar() as progress:
                learner = OnlineLearner(kibitz.store, kibitz.deployment, found, announce, progress)
                people = simulation.People(utility, reaction_rate, noise, found.seed)
                play = simulation.Simulation(kibitz.dialogue, kibitz.policy, learner, people, progress)
                rows.extend(await play.run(rounds, messages, samples, lambda row: announce(row.line())))

    run(main())
    console.print(simulation.table(rows))
    if plot is not None:
        simulation.plot(rows, plot, f"users: {users}, {noise:.0%} noise, {reaction_rate:.0%} react")
        console.print(f"learning curve: {plot}")
    setup = {"users": users, "rounds": rounds, "messages": messages, "reaction_rate": reaction_rate, "noise": noise}
    setup |= {"samples": samples, "seed": found.seed, "model": found.policy.model}
    setup |= {"training": found.training.model_dump(), "gate": found.gate.model_dump()}
    cli.write_json(json_file, "simulate", simulation.figures(rows), setup)


def measure(
    name: str,
    config: Config,
    job: Callable[[Kibitz, Progress], Awaitable[dict[str, Any]]],
    json_file: Path | None,
    setup: dict[str, Any],
) -> None:
    """Run a benchmark on a kibitz that serves, with a database and versions of its own; print its figures and write them."""
    cli.check_writable(json_file)
    config, model = with_model(config)
    figures: dict[str, Any] = {}
    scratch = config.data / "bench"
    if not is_held(scratch, "serve"):
        shutil.rmtree(scratch, ignore_errors=True)
    apart = config.model_copy(update={"data_dir": scratch, "database": DatabaseConfig()})

    async def main() -> None:
        async with running(apart, model, announce) as kibitz:
            with cli.progress_bar() as progress:
                figures.update(await job(kibitz, progress))

    run(main())
    cli.print_figures(figures)
    cli.write_json(json_file, name, figures, setup | {"seed": config.seed})


@bench.command("swap")
def bench_swap(
    swaps: Annotated[int, typer.Option(min=1)] = 6,
    requests: Annotated[int, typer.Option(min=16, help="Requests without swaps; at least as many with them.")] = 600,
    concurrent: Annotated[int, typer.Option(min=1)] = 16,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Swap versions under streaming load: failed, mixed and stalled answers, and what it costs."""
    from learning import benchmark

    found = configured(config, data_dir, seed)

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=found.data) as scratch:
            sources = [Path(scratch) / f"weights-{number}" for number in range(2)]
            base = kibitz.registry.get(BASE).base_model
            for number, source in enumerate(sources):
                benchmark.random_version(found, base, source, found.seed + number)
            tokenizer = kibitz.dialogue.tracker.tokenizer
            return await benchmark.swap(kibitz.deployment, tokenizer, sources, swaps, requests, concurrent, progress)

    measure("bench swap", found, job, json_file, {"concurrent": concurrent})


@bench.command("overhead")
def bench_overhead(
    messages: Annotated[int, typer.Option(min=16, help="Messages in one block.")] = 128,
    blocks: Annotated[int, typer.Option(min=1)] = 3,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What DialogueManager adds to the same prompts straight to vLLM."""
    from learning import benchmark

    found = configured(config, data_dir, seed)

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        return await benchmark.overhead(kibitz.dialogue, kibitz.policy, messages, blocks, found.seed, progress)

    measure("bench overhead", found, job, json_file, {"messages": messages, "blocks": blocks})


@bench.command("connectors")
def bench_connectors(
    messages: Annotated[int, typer.Option(min=64, help="Messages for each number of conversations.")] = 256,
    think: Annotated[float, typer.Option(min=0.1, help="Seconds that people think, but at full load.")] = 1.0,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What Discord, Slack and the web add to vLLM's own time, over local servers of each (in a checkout)."""
    from connectors import benchmark

    found = configured(config, data_dir, seed)
    platforms = benchmark.local_platforms()
    unlimited = Access(AccessConfig(messages_per_minute=10**6, opinions_per_minute=10**6))

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for make in platforms:
            platform = make(shared(kibitz, unlimited))
            figures |= await benchmark.measure(kibitz.dialogue, platform, messages, think, found.seed, progress)
        return figures

    measure("bench connectors", found, job, json_file, {"messages": messages, "think": think})


def main() -> None:
    """The console script."""
    cli.main()


if __name__ == "__main__":
    main()
