"""Find the roles of people on a Discord server, for access lists of roles.

An event usually names them; a message or a reaction that is read from the API does not.
"""

import logging

import discord

from connectors.access import Access

log = logging.getLogger(__name__)


def read_roles(person: object) -> list[str]:
    """Return the ids of the roles that an event names; [] if it names none."""
    return [str(role.id) for role in person.roles] if isinstance(person, discord.Member) else []


class Roles:
    """The roles of people. Each is fetched from Discord once, and only if access depends on roles."""

    def __init__(self, access: Access):
        self._are_needed = access.needs_roles
        self._known: dict[tuple[int, int], list[str] | None] = {}

    async def find_roles(self, guild: discord.Guild | None, person: discord.abc.User) -> list[str] | None:
        """Return the ids of a person's roles on a server, or None if they cannot be read now."""
        if isinstance(person, discord.Member) or guild is None or not self._are_needed:
            return read_roles(person)
        key = guild.id, person.id
        if key not in self._known:
            self._known[key] = await _fetch_roles(guild, person.id)
        return self._known[key]


async def _fetch_roles(guild: discord.Guild, user_id: int) -> list[str] | None:
    try:
        return read_roles(guild.get_member(user_id) or await guild.fetch_member(user_id))
    except discord.NotFound:
        return []  # has left the server
    except discord.HTTPException as error:
        log.info("the roles of user %s cannot be read: %s", user_id, error)
        return None
