"""The slash commands, the same on every chat platform. `Desk` does the work."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from bot.errors import KibitzError, quote_first_line
from connectors.access import Access
from connectors.answers import SORRY, Answers
from connectors.base import Desk

log = logging.getLogger(__name__)

CONSENT_CHOICES = ("status", "on", "off")  # of /privacy; the first is the default


@dataclass(frozen=True)
class Command:
    """One slash command."""

    name: str
    description: str
    choices: tuple[str, ...] = ()
    for_operators: bool = False


COMMANDS = (
    Command("status", "Show what is live, what was said and what was learned."),
    Command("why", "Show what made the last answer here, and what reactions to it led to."),
    Command("privacy", "Show whether kibitz may learn from you; on and off change it.", CONSENT_CHOICES),
    Command("forget-me", "Erase what you wrote and reacted to, and every version that learned from it."),
    Command("rollback", "Roll back the live version (operators).", for_operators=True),
    Command("pause-learning", "Pause learning, or resume it if it is paused (operators).", for_operators=True),
)


@dataclass(frozen=True)
class Asker:
    """The person who uses a command, and the channel."""

    user: str
    channel: str
    roles: Iterable[str] = ()


def ask_for_choice(choices: Iterable[str]) -> str:
    """Return the reply to a choice that does not exist."""
    return f"Say one of {', '.join(choices)}."


class Commands:
    """The commands of one platform."""

    def __init__(self, desk: Desk, access: Access, answers: Answers):
        self.desk = desk
        self.access = access
        self.answers = answers

    async def run(self, command: Command, asker: Asker, choice: str = "") -> str:
        """Run a command. Return the reply, which only the asker may see."""
        if command.for_operators and not self.access.is_operator(asker.user, asker.roles):
            return "Only an operator may do that (config keys access.operators, access.operator_roles)."
        if command.choices and choice not in ("", *command.choices):
            return ask_for_choice(command.choices)
        try:
            return await self._dispatch(command.name, asker, choice or "status")
        except KibitzError as error:
            return str(error)
        except Exception as error:  # whatever fails: the asker gets an apology, operators the reason in one line
            log.error("/%s failed: %s", command.name, quote_first_line(error), exc_info=log.isEnabledFor(logging.DEBUG))
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
