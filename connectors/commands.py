"""Commands: what people may ask of kibitz itself with slash commands, the same on every chat platform.

It knows no platform and no database: what is asked goes to the desk that the composition root made.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from bot.errors import KibitzError
from connectors.access import Access
from connectors.answers import SORRY, Answers
from connectors.base import Desk

log = logging.getLogger(__name__)

CONSENT_CHOICES = ("status", "on", "off")  # what /privacy takes; the first where nothing is said


@dataclass(frozen=True)
class Command:
    """One slash command."""

    name: str
    description: str
    choices: tuple[str, ...] = ()
    for_operators: bool = False


COMMANDS = (
    Command("status", "What is live, what was said, what was learned."),
    Command("why", "What made the last answer here, and what came of reactions to it."),
    Command("privacy", "Whether kibitz may learn from you; on and off change it.", CONSENT_CHOICES),
    Command("forget-me", "Erase what you wrote and reacted to, and every version that learned from it."),
    Command("rollback", "Take the live version back (operators).", for_operators=True),
    Command("pause-learning", "Train no new versions; used again, go on (operators).", for_operators=True),
)


@dataclass(frozen=True)
class Asker:
    """Who uses a command, and where."""

    user: str
    channel: str
    roles: Iterable[str] = ()


def ask_for_choice(choices: Iterable[str]) -> str:
    """What to say to somebody who chose what there is not."""
    return f"Say one of {', '.join(choices)}."


class Commands:
    """The commands of one platform."""

    def __init__(self, desk: Desk, access: Access, answers: Answers):
        self.desk = desk
        self.access = access
        self.answers = answers

    async def run(self, command: Command, asker: Asker, choice: str = "") -> str:
        """Do what was asked; returns what to tell the one who asked, and nobody else."""
        if command.for_operators and not self.access.is_operator(asker.user, asker.roles):
            return "Only an operator may do that (config keys access.operators, access.operator_roles)."
        if command.choices and choice not in ("", *command.choices):
            return ask_for_choice(command.choices)
        try:
            return await self._dispatch(command.name, asker, choice or "status")
        except KibitzError as error:
            return str(error)
        except Exception as error:  # whatever fails: who asked is told, and operators why, in one line
            log.error("/%s failed: %r", command.name, error, exc_info=log.isEnabledFor(logging.DEBUG))
            return SORRY

    async def _dispatch(self, name: str, asker: Asker, choice: str) -> str:
        platform = self.answers.platform
        match name:
            case "why":
                turn_id = await self.answers.find_last_turn_id(asker.channel)
                return "There is no answer here yet." if turn_id is None else await self.desk.explain_turn(turn_id)
            case "privacy":
                return await self.desk.manage_consent(platform, asker.user, choice)
            case "forget-me":
                return await self.desk.forget_person(platform, asker.user)
            case "rollback":
                return await self.desk.roll_back()
            case "pause-learning":
                return await self.desk.pause_learning()
            case _:
                return await self.desk.describe_status()
