"""`kibitz simulate`: learn from simulated people with hidden preferences."""

from typing import Annotated

import typer

from bot.app import run, running
from bot.cli.options import JsonFile, PlotFile, command
from bot.config import Config
from bot.models.purpose import Purpose
from bot.output import announce, check_writable, console, progress_bar, write_json
from bot.store.stores import open_stores
from learning.rollout.loop import OnlineLearner
from learning.training.choice import prepare_model
from learning.training.pretrain import is_toy


@command(default_model="toy")
def simulate(
    config: Config,
    users: Annotated[str | None, typer.Option(help="Built-in users, or a file with utility(prompt, reply).")] = None,
    rounds: Annotated[int | None, typer.Option(min=1)] = None,
    messages: Annotated[int | None, typer.Option(min=1, help="Messages per round.")] = None,
    reaction_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of answers that get a reaction.")
    ] = None,
    noise: Annotated[float, typer.Option(min=0, max=1, help="The share of reactions that are wrong.")] = 0.1,
    samples: Annotated[int, typer.Option(min=1, help="Answers per held-out prompt in the evaluation.")] = 3,
    json_file: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Learn from simulated users with hidden preferences, and print the learning curve."""
    from learning.bench import held_out, simulated_people, simulation, simulation_figures

    check_writable(json_file, plot)
    usual = simulated_people.choose_defaults(is_toy(config.policy.model))
    users, rounds = users or usual.users, rounds or usual.rounds
    messages = messages or usual.messages
    reaction_rate = usual.reaction_rate if reaction_rate is None else reaction_rate
    utility = simulated_people.find_utility(users)
    database, _, _ = open_stores(config)
    simulation.check_only_simulated(database)
    database.close()
    config, base = prepare_model(config, purpose=Purpose.SIMULATE)
    played: list[simulation.Simulation] = []

    async def main() -> None:
        async with running(config, base, announce) as kibitz:
            with progress_bar() as progress:
                learner = OnlineLearner(kibitz.store, kibitz.deployment, config, announce, progress)
                people = simulated_people.People(utility, reaction_rate, noise, config.seed)
                asked = simulated_people.read_prompts(is_toy(base))
                parts = kibitz.dialogue, kibitz.policy, learner, kibitz.selector
                play = simulation.Simulation(*parts, people, asked, progress)
                await play.run(rounds, messages, samples, lambda row: announce(row.to_line()))
                played.append(play)

    run(main())
    [play] = played
    console.print(simulation_figures.make_table(play.rows), simulation_figures.make_samples_table(play.samples))
    console.print(simulation_figures.describe_changes(play), markup=False, highlight=False)
    if plot is not None:
        simulation_figures.plot(play, plot, f"users: {users}, {noise:.0%} noise, {reaction_rate:.0%} react")
        console.print(f"learning curve: {plot}")
    setup = {"users": users, "rounds": rounds, "messages": messages, "reaction_rate": reaction_rate, "noise": noise}
    setup |= {"samples": samples, "seed": config.seed, "model": config.policy.model}
    setup |= {"served_samples": held_out.SERVED_SAMPLES, "candidates": config.serving.candidates}
    setup |= {"training": config.training.model_dump(), "gate": config.gate.model_dump()}
    write_json(json_file, "simulate", simulation_figures.compute_figures(play, config.policy.model), setup)
