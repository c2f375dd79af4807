"""`kibitz doctor`: joins the checks of the machine, of the platforms and of the model.

Like `bot.__main__` it imports all three packages, each when it is needed.
"""

from dataclasses import asdict
from typing import Annotated

import typer

from bot import cli
from bot.cli import ConfigFile, DataDir, JsonFile, Seed, app, configured
from bot.config import Config
from bot.doctor import examine, machine_checks, works
from bot.output import announce, check_writable, print_rows, write_json


@app.command()
def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the answer and the training step.")] = False,
    json_file: JsonFile = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    seed: Seed = None,
) -> None:
    """Look whether all that kibitz needs is here: one table of what works, and what to do where it does not."""
    from learning.model_choice import sized_model
    from learning.self_test import SelfTest

    found = configured(config, data_dir, seed)
    check_writable(json_file)
    with SelfTest(found, lambda: sized_model(found)) as test:
        checks = [*machine_checks(found), ("tokens", lambda: _tokens(found)), *test.checks(quick)]
        rows = examine(checks, lambda row: announce(f"{row.what}: {row.outcome}"))
    print_rows(("what", "works", "found", "what to do"), [(row.what, row.outcome, row.found, row.to_do) for row in rows])
    write_json(json_file, "doctor", {row.what: asdict(row) for row in rows}, {"model": found.policy.model})
    if not works(rows):
        raise typer.Exit(cli.BAD_INPUT)


def _tokens(config: Config) -> str:
    """Which platforms are turned on, with secrets that look right."""
    names = []
    if config.discord.token_env:
        from connectors.discord import token

        token(config.discord)
        names.append("Discord")
    if config.slack.bot_token_env or config.slack.app_token_env or config.slack.signing_secret_env:
        from connectors.slack import check_secrets

        check_secrets(config.slack)
        names.append("Slack")
    if config.web.enabled:
        from connectors.web import users

        names.append(f"web ({len(users(config.web)) or 'no'} tokens)")
    return ", ".join(names) or "no platform is turned on: kibitz chat needs none"
