"""Replace Discord's markup with the names that people see, and restore it in answers.

Discord writes mentions, custom emoji and times as `<@12>`, `<#34>`, `<:name:56>`, `<t:78>`. The policy is shown names, as
people are. A name in its answer that it was shown becomes markup again. Mentions notify nobody (the client's
`allowed_mentions`).
"""

import re
from datetime import UTC, datetime

import discord

MARKUP = re.compile(
    r"<@!?(?P<user>\d+)>|<@&(?P<role>\d+)>|<#(?P<channel>\d+)>|<a?:(?P<emoji>\w+):\d+>"
    r"|</(?P<command>[^:<>]+):\d+>|<t:(?P<time>\d{1,11})(?::\w)?>"
)
UNKNOWN = {"user": "@unknown-user", "role": "@unknown-role", "channel": "#unknown"}  # as Discord itself shows them
CODE = r"```.*?(?:```|\Z)|`[^`\n]+`"
LEFT_ALONE = rf"{CODE}|<[^<>\s]+>|\w+://\S+"  # code, finished markup, links


def mentions_us(message: discord.Message, me: discord.ClientUser) -> bool:
    """Return whether a message mentions us, or the role that Discord made for us."""
    ours = _own_role(message)
    return any(user.id == me.id for user in message.mentions) or (ours is not None and ours in message.role_mentions)


class Markup:
    """The names in the messages that one answer is about."""

    def __init__(self, message: discord.Message, me: discord.ClientUser):
        self._message, self._me = message, me
        self._markup_by_name: dict[str, str] = {}  # the markup of each name that was read

    def make_readable(self, content: str, message: discord.Message | None = None) -> str:
        """Return the text of `message` (by default the one that is answered) as people see it, without mentions of us."""
        mentioned = {user.id: user for user in (message or self._message).mentions}

        def name(match: re.Match[str]) -> str:
            found = self._find_name(match, mentioned)
            if found is None:
                return UNKNOWN[match.lastgroup or ""]
            if match.lastgroup not in ("command", "time"):
                self._markup_by_name[found] = match[0]
            return found

        return MARKUP.sub(name, self._remove_own_mentions(content)).strip()

    def restore_markup(self, text: str) -> str:
        """Return an answer with markup for names that were read and the server's own emoji. Code stays as it is."""
        guild = self._message.guild
        emoji = {f":{one.name}:": str(one) for one in guild.emojis if one.is_usable()} if guild and ":" in text else {}
        known = emoji | self._markup_by_name
        if not known:
            return text
        names = "|".join(re.escape(one) for one in sorted(known, key=len, reverse=True))
        pattern = re.compile(rf"(?P<left>{LEFT_ALONE})|(?<![\w@#:])(?P<name>{names})(?!\w)", re.DOTALL)
        return pattern.sub(lambda match: match["left"] or known[match["name"]], text)

    def _find_name(self, match: re.Match[str], mentioned: dict[int, discord.User | discord.Member]) -> str | None:
        guild, found = self._message.guild, match[match.lastgroup or 0]
        match match.lastgroup:
            case "user":
                user = mentioned.get(int(found)) or (guild and guild.get_member(int(found)))
                return f"@{user.display_name}" if user else None
            case "role":
                role = guild and guild.get_role(int(found))
                return f"@{role.name}" if role else None
            case "channel":
                return self._find_channel_name(int(found))
            case "emoji":
                return f":{found}:"
            case "command":
                return f"/{found}"
            case _:
                return f"{datetime.fromtimestamp(int(found), UTC):%Y-%m-%d %H:%M} UTC"

    def _remove_own_mentions(self, content: str) -> str:
        ours = _own_role(self._message)
        ids = rf"@!?{self._me.id}" + (f"|@&{ours.id}" if ours is not None else "")
        return re.sub(rf"<(?:{ids})>\s*", "", content)

    def _find_channel_name(self, number: int) -> str | None:
        """Return the name of a channel, or None if the author of the message may not see it."""
        guild, author = self._message.guild, self._message.author
        channel = guild.get_channel_or_thread(number) if guild is not None else None
        if channel is None or not isinstance(author, discord.Member):
            return None
        try:
            return f"#{channel.name}" if channel.permissions_for(author).view_channel else None
        except discord.ClientException:  # a thread whose channel is unknown
            return None


def _own_role(message: discord.Message) -> discord.Role | None:
    return None if message.guild is None else message.guild.self_role
