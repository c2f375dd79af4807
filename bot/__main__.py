"""The commands that serve. What they are made of is joined in `bot.app`; the other commands are in `bot.cli` and `learning`.

Run: ``kibitz COMMAND`` or ``python -m bot COMMAND``.
"""

import os
import signal

from bot.types import Progress

# Ctrl-C while modules are loaded ends the process at once: libraries lose the exception, or print what they were doing.
_usual = signal.getsignal(signal.SIGINT)
if _usual is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
try:
    import asyncio
    import shutil
    import tempfile
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from typing import Annotated, Any

    import typer

    from bot import backup_commands, cli, doctor_command, forget_command
    from bot.app import Kibitz, desk, run, running, shared
    from bot.cli import ConfigFile, DataDir, JsonFile, ModelName, PlotFile, Seed, app, bench, configured
    from bot.config import AccessConfig, Config, DatabaseConfig
    from bot.data_directory import is_held
    from bot.output import announce, check_writable, console, print_figures, progress_bar, write_json
    from bot.stores import open_stores
    from connectors.access import Access
    from connectors.base import Connector
    from learning import bench_commands, commands
    from learning.commands import with_model
    from learning.loop import OnlineLearner
    from learning.pretrain import is_toy
finally:
    signal.signal(signal.SIGINT, _usual)

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# Importing a module of commands adds them.
__all__ = ["backup_commands", "bench_commands", "commands", "doctor_command", "forget_command", "main"]


@app.command()
def chat(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Talk in the terminal; learning goes on in the background."""
    from connectors.terminal import Terminal

    found, model = with_model(configured(config, data_dir, seed))

    async def main() -> None:
        async with running(found, model, announce, may_change=True) as kibitz:
            terminal = Terminal(kibitz.dialogue, desk(kibitz))
            kibitz.deployment.announce = kibitz.health.tell = terminal.announce
            if found.learning.enabled:
                learner = OnlineLearner(kibitz.store, kibitz.deployment, found, terminal.announce)
                kibitz.start(learner.run(kibitz.health))
            await terminal.run()

    run(main())


@app.command()
def serve(config: ConfigFile = None, data_dir: DataDir = None, seed: Seed = None) -> None:
    """Serve and learn until stopped (Ctrl-C or SIGTERM)."""
    found = configured(config, data_dir, seed)
    made = _connectors(found)
    found, model = with_model(found)

    async def main() -> None:
        async with running(found, model, announce, may_change=True) as kibitz:
            announce(f"serving {kibitz.policy.version}; vLLM answers at {kibitz.policy.url}")
            connectors = [make(kibitz) for make in made]
            for connector in connectors:
                kibitz.keep(connector.name, connector.run)
            if found.learning.enabled:
                learner = OnlineLearner(kibitz.store, kibitz.deployment, found, announce)
                kibitz.start(learner.run(kibitz.health))
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.gather(*(connector.stop() for connector in connectors), return_exceptions=True)

    run(main(), until_stopped=True)


def _connectors(config: Config) -> list[Callable[[Kibitz], Connector]]:
    """What makes each connector that the config turns on. Tokens and addresses are looked at now, before anything starts."""
    access = Access(config.access)
    made: list[Callable[[Kibitz], Connector]] = []
    if config.discord.token_env:
        from connectors.discord import Discord, token

        bot_token = token(config.discord)
        made.append(lambda kibitz: Discord(shared(kibitz, access), config.discord, bot_token))
    if config.slack.bot_token_env or config.slack.app_token_env or config.slack.signing_secret_env:
        from connectors.slack import Secrets, Slack

        secrets = Secrets.of(config.slack)
        made.append(lambda kibitz: Slack(shared(kibitz, access), config.slack, secrets))
    if config.web.enabled:
        from connectors.web import Door, Web

        door = Door.open(config.web)
        announce(f"chat and API: {door.url}")
        made.append(lambda kibitz: Web(shared(kibitz, access), door))
    return made


@app.command()
def simulate(
    users: Annotated[str | None, typer.Option(help="Built-in users, or a file with utility(prompt, reply).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1)] = None,
    messages: Annotated[int | None, typer.Option(min=1, help="Exchanges a round.")] = None,
    reaction_rate: Annotated[float | None, typer.Option(min=0, max=1, help="How often a user reacts.")] = None,
    noise: Annotated[float, typer.Option(min=0, max=1, help="How often a reaction is the wrong one.")] = 0.1,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each held-out prompt when judging.")] = 3,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Simulated users with hidden preferences talk, react, and are learned from."""
    from learning import simulated_people, simulation

    found = configured(config, data_dir, seed, model)
    check_writable(json_file, plot)
    usual = simulated_people.usual(is_toy(found.policy.model))
    users, rounds = users or usual.users, rounds or usual.rounds
    messages = messages or usual.messages
    reaction_rate = usual.reaction_rate if reaction_rate is None else reaction_rate
    utility = simulated_people.users(users)
    database, _, _ = open_stores(found)
    simulation.check_only_simulated(database)
    database.close()
    found, base = with_model(found)
    played: list[simulation.Simulation] = []

    async def main() -> None:
        async with running(found, base, announce) as kibitz:
            with progress_bar() as progress:
                learner = OnlineLearner(kibitz.store, kibitz.deployment, found, announce, progress)
                people = simulated_people.People(utility, reaction_rate, noise, found.seed)
                asked = simulated_people.prompts(is_toy(base))
                play = simulation.Simulation(kibitz.dialogue, kibitz.policy, learner, people, asked, progress)
                await play.run(rounds, messages, samples, lambda row: announce(row.line()))
                played.append(play)

    run(main())
    rows = played[0].rows
    console.print(simulation.table(rows), simulation.samples_table(played[0].samples))
    if plot is not None:
        simulation.plot(rows, plot, f"users: {users}, {noise:.0%} noise, {reaction_rate:.0%} react")
        console.print(f"learning curve: {plot}")
    setup = {"users": users, "rounds": rounds, "messages": messages, "reaction_rate": reaction_rate, "noise": noise}
    setup |= {"samples": samples, "seed": found.seed, "model": found.policy.model}
    setup |= {"training": found.training.model_dump(), "gate": found.gate.model_dump()}
    write_json(json_file, "simulate", simulation.figures(played[0], found.policy.model), setup)


def measure(
    name: str,
    config: Config,
    job: Callable[[Kibitz, Progress], Awaitable[dict[str, Any]]],
    json_file: Path | None,
    setup: dict[str, Any],
) -> None:
    """Run a benchmark on a kibitz that serves, with a database and versions of its own; print its figures and write them."""
    check_writable(json_file)
    config, model = with_model(config)
    figures: dict[str, Any] = {}
    scratch = config.data / "bench" / "serving"  # beside the points that `bench learning` keeps
    if not is_held(scratch, "serve"):
        shutil.rmtree(scratch, ignore_errors=True)
    apart = config.model_copy(update={"data_dir": scratch, "database": DatabaseConfig()})

    async def main() -> None:
        async with running(apart, model, announce) as kibitz:
            with progress_bar() as progress:
                figures.update(await job(kibitz, progress))

    run(main())
    print_figures(figures)
    figures["model"] = config.policy.model
    write_json(json_file, name, figures, setup | {"seed": config.seed})


@bench.command("swap")
def bench_swap(
    swaps: Annotated[int | None, typer.Option(min=1)] = None,
    requests: Annotated[int | None, typer.Option(min=16, help="Requests without swaps; at least as many with them.")] = None,
    concurrent: Annotated[int, typer.Option(min=1)] = 16,
    json_file: JsonFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Swap versions under streaming load: failed, mixed and stalled answers, and what it costs."""
    from learning import benchmark

    found = configured(config, data_dir, seed, model)
    usual = benchmark.usual(found.policy.model)
    swaps, requests = swaps or usual.swaps, requests or usual.requests

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=found.data) as scratch:
            sources = [Path(scratch) / f"weights-{number}" for number in range(2)]
            base = kibitz.registry.base().base_model
            for number, source in enumerate(sources):
                benchmark.random_version(kibitz.config, base, source, found.seed + number)
            tokenizer = kibitz.dialogue.tracker.tokenizer
            return await benchmark.swap(kibitz.deployment, tokenizer, sources, swaps, requests, concurrent, progress)

    measure("bench swap", found, job, json_file, {"concurrent": concurrent, "swaps": swaps, "requests": requests})


@bench.command("overhead")
def bench_overhead(
    messages: Annotated[int | None, typer.Option(min=16, help="Messages in one block.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: JsonFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What DialogueManager adds to the same prompts straight to vLLM."""
    from learning import benchmark

    found = configured(config, data_dir, seed, model)
    usual = benchmark.usual(found.policy.model)
    alone = 0 if messages else usual.alone
    messages, blocks = messages or usual.messages, blocks or usual.blocks

    async def job(kibitz: Kibitz, progress: Progress) -> dict[str, Any]:
        return await benchmark.overhead(kibitz.dialogue, kibitz.policy, messages, blocks, found.seed, progress, alone)

    measure("bench overhead", found, job, json_file, {"messages": messages, "blocks": blocks})


@bench.command("connectors")
def bench_connectors(
    messages: Annotated[int, typer.Option(min=64, help="Messages for each number of conversations.")] = 256,
    think: Annotated[float, typer.Option(min=0.1, help="Seconds that people think, but at full load.")] = 1.0,
    json_file: JsonFile = None,
    model: ModelName = "toy",
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """What Discord, Slack and the web add to vLLM's own time, over local servers of each (in a checkout)."""
    from connectors import benchmark

    found = configured(config, data_dir, seed, model)
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
