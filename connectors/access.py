"""Access: who may talk to kibitz and teach it, where, and how fast.

Lists hold the platforms' own ids. It knows no platform and no database; limits are kept in memory.
"""

from collections.abc import Iterable

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from bot.config import AccessConfig

TOO_FAST = "That was a lot at once; please give me a minute."


class Access:
    """The lists and limits of the config."""

    def __init__(self, config: AccessConfig):
        self.config = config
        self.shed = 0  # opinions that were too many to be counted
        self._messages = RateLimitItemPerMinute(config.messages_per_minute, namespace="messages")
        self._opinions = RateLimitItemPerMinute(config.opinions_per_minute, namespace="opinions")
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def admits(self, user: str, channel: str = "", roles: Iterable[str] = ()) -> bool:
        """Whether a user may talk and react here. A denial beats an allowance; an empty list of the allowed allows all."""
        known, config = set(roles), self.config
        if user in config.deny_users or channel in config.deny_channels or known & set(config.deny_roles):
            return False
        if config.allow_channels and channel not in config.allow_channels:
            return False
        named = config.allow_users or config.allow_roles
        return not named or user in config.allow_users or bool(known & set(config.allow_roles))

    def operates(self, user: str, roles: Iterable[str] = ()) -> bool:
        """Whether a user may take versions back and pause learning."""
        return user in self.config.operators or bool(set(roles) & set(self.config.operator_roles))

    def in_time(self, platform: str, user: str) -> bool:
        """Whether a user may write one more message now; counts it."""
        return self._limiter.hit(self._messages, platform, user)

    def may_judge(self, platform: str, user: str) -> bool:
        """Whether one more opinion of a user is taken now; counts it."""
        return self._limiter.hit(self._opinions, platform, user)
