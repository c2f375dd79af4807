"""Read the token of a Discord bot from the environment."""

import os

from bot.config import DiscordConfig
from bot.errors import ConfigError


def read_token(config: DiscordConfig) -> str:
    """Return the bot's token. Raises ConfigError if the variable is not set or holds a Slack token."""
    found = os.environ.get(config.token_env, "").strip()
    key = f"config key discord.token_env has value '{config.token_env}'"
    if not found:
        raise ConfigError(f"{key}, a variable that is not set; set it to the bot's token")
    if found.startswith(("xox", "xapp")):
        raise ConfigError(f"{key}, a variable that holds a Slack token; put the Discord bot's there")
    return found
