"""The commands that talk with people: in the terminal, or on the platforms that the config turns on."""

import asyncio
from collections.abc import Callable

from bot.app import Kibitz, make_desk, make_learner, make_services, run, run_until_stopped, running
from bot.cli.options import command
from bot.config import Config
from bot.output import announce
from connectors.access import Access
from connectors.base import Connector
from learning.training.choice import prepare_model


@command()
def chat(config: Config) -> None:
    """Chat in the terminal, and learn from your reactions in the background."""
    from connectors.terminal import Terminal

    config, model = prepare_model(config)

    async def main() -> None:
        async with running(config, model, announce, may_change_base=True) as kibitz:
            terminal = Terminal(kibitz.dialogue, make_desk(kibitz))
            if config.learning.enabled:
                learner = make_learner(kibitz)
                kibitz.start(learner.run(kibitz.health))
            await terminal.run()

    run(main())


@command()
def serve(config: Config) -> None:
    """Serve the configured platforms and learn, until Ctrl-C or SIGTERM."""
    made = _prepare_connectors(config)
    config, model = prepare_model(config)

    async def main() -> None:
        async with running(config, model, announce, may_change_base=True) as kibitz:
            announce(f"serving {kibitz.policy.version}; vLLM answers at {kibitz.policy.admin.url}")
            connectors = [make(kibitz) for make in made]
            for connector in connectors:
                kibitz.keep_running(connector.name, connector.run)
            if config.learning.enabled:
                learner = make_learner(kibitz)
                kibitz.start(learner.run(kibitz.health))
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.gather(*(connector.stop() for connector in connectors), return_exceptions=True)

    run_until_stopped(main())


def _prepare_connectors(config: Config) -> list[Callable[[Kibitz], Connector]]:
    """Return a factory for each connector that is turned on. Tokens and addresses are checked before anything starts."""
    access = Access(config.access)
    made: list[Callable[[Kibitz], Connector]] = []
    if config.discord.token_env:
        from connectors.discord.connector import Discord
        from connectors.discord.token import read_token

        bot_token = read_token(config.discord)
        made.append(lambda kibitz: Discord(make_services(kibitz, access), config.discord, bot_token))
    if config.slack.bot_token_env or config.slack.app_token_env or config.slack.signing_secret_env:
        from connectors.slack.connector import Secrets, Slack

        secrets = Secrets.open(config.slack)
        made.append(lambda kibitz: Slack(make_services(kibitz, access), config.slack, secrets))
    if config.web.enabled:
        from connectors.web.server import Endpoint, Web

        door = Endpoint.open(config.web)
        announce(f"chat and API: {door.url}")
        made.append(lambda kibitz: Web(make_services(kibitz, access), door))
    return made
