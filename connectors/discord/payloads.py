"""Skip events that discord.py cannot read, without losing the connection, and give each event an id in the log.

In discord.py an error in a payload ends the client, which loses the session and all events until the next one.
"""

import logging
from collections.abc import Callable
from typing import Any

import discord

from bot.errors import quote_first_line
from bot.logs import working_on
from bot.types import new_id

log = logging.getLogger(__name__)

Parse = Callable[[dict[str, Any]], None]


def tolerate_bad_messages(client: discord.Client) -> None:
    """Make a client log messages, reactions and interactions that it cannot read, and go on."""
    parsers: dict[str, Parse] = client._connection.parsers
    for name, parse in parsers.items():
        if name.startswith(("MESSAGE_", "INTERACTION_")):
            parsers[name] = _make_tolerant(name, parse)


def _make_tolerant(name: str, parse: Parse) -> Parse:
    def read(data: dict[str, Any]) -> None:
        with working_on(request=f"discord:{data.get('message_id') or data.get('id') or new_id()}"):
            try:
                poll = data.get("poll")
                if poll and poll.get("expiry") is None:  # a poll without an end, which discord.py 2.7 cannot read
                    data = {**data, "poll": {**poll, "expiry": data["timestamp"]}}
                parse(data)
            except Exception as error:  # whatever a payload makes discord.py raise
                log.warning(
                    "an event of Discord (%s %s) cannot be read: %s", name, data.get("id", ""), quote_first_line(error)
                )

    return read
