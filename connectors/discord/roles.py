"""Roles: those of people on a Discord server, where lists of roles decide who may take part.

An event mostly names them; a message or a reaction that is read from the API does not. It knows no list.
"""

import logging

import discord

from connectors.access import Access

log = logging.getLogger(__name__)


def read_roles(person: object) -> list[str]:
    """The roles that an event names; none where it names none."""
    return [str(role.id) for role in person.roles] if isinstance(person, discord.Member) else []


class Roles:
    """The roles of people, asked of Discord once each, and only if they decide something."""

    def __init__(self, access: Access):
        self._are_needed = access.needs_roles
        self._known: dict[tuple[int, int], list[str] | None] = {}

    async def find_roles(self, guild: discord.Guild | None, person: discord.abc.User) -> list[str] | None:
        """The roles of a person on a server; None where they cannot be known now."""
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
