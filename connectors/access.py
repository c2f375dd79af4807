"""Decide who may talk to kibitz and teach it, where, and how fast.

The lists hold the platforms' own ids. The limits are kept in memory.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from bot.config import AccessConfig

TOO_FAST = "That was a lot at once; please give me a minute."


class Access:
    """The access lists and rate limits of the config."""

    def __init__(self, config: AccessConfig):
        self.config = config
        self.shed_count = 0  # opinions over the limit, which are not recorded (connectors/opinions.py counts them)
        self._messages = MovingWindow(config.messages_per_minute)
        self._opinions = MovingWindow(config.opinions_per_minute)
        self._messages_of_sources = MovingWindow(config.source_messages_per_minute)
        self._opinions_of_sources = MovingWindow(config.source_opinions_per_minute)

    @property
    def needs_roles(self) -> bool:
        """Whether access depends on people's roles."""
        return bool(self.config.allow_roles or self.config.deny_roles)

    def admits(self, user: str, channel: str = "", roles: Iterable[str] = (), parent: str = "") -> bool:
        """Return whether a user may talk and react here. A denial beats an allowance; an empty allow list allows everybody.

        A thread (`channel`) is on a list if the thread or its channel (`parent`) is.
        """
        known, here, config = set(roles), {channel, parent}, self.config
        if user in config.deny_users or here & set(config.deny_channels) or known & set(config.deny_roles):
            return False
        if config.allow_channels and not here & set(config.allow_channels):
            return False
        named = config.allow_users or config.allow_roles
        return not named or user in config.allow_users or bool(known & set(config.allow_roles))

    def is_operator(self, user: str, roles: Iterable[str] = ()) -> bool:
        """Return whether a user may roll back versions and pause learning."""
        return user in self.config.operators or bool(set(roles) & set(self.config.operator_roles))

    def may_write(self, platform: str, user: str, sources: Iterable[str] = ()) -> bool:
        """Return whether a user may write one more message now, and count it if so.

        `sources` are the token and address that it came from. Each has its own limit, because a client may name any user.
        """
        return _try_acquire_all(
            platform, [(self._messages, user), *((self._messages_of_sources, source) for source in sources)]
        )

    def may_judge(self, platform: str, user: str, sources: Iterable[str] = ()) -> bool:
        """Return whether a user may give one more opinion now, and count it if so. `sources` as for `may_write`."""
        return _try_acquire_all(
            platform, [(self._opinions, user), *((self._opinions_of_sources, source) for source in sources)]
        )


class MovingWindow:
    """A rate limit of `limit` acts per key in any `seconds`. Beyond `keys` keys, the least recently active are dropped."""

    def __init__(self, limit: int, seconds: float = 60.0, keys: int = 100_000):
        self.limit, self.seconds, self.keys = limit, seconds, keys
        self._acts: OrderedDict[str, deque[float]] = OrderedDict()

    def try_acquire(self, key: str) -> bool:
        """Count an act of `key` now if the limit allows it. Return whether it does."""
        if not self.has_room(key):
            return False
        self.count(key)
        return True

    def has_room(self, key: str) -> bool:
        """Return whether the limit allows one more act of `key` now."""
        acts = self._acts.get(key)
        return acts is None or len(acts) < self.limit or time.monotonic() - acts[0] >= self.seconds

    def count(self, key: str) -> None:
        """Count an act of `key` now."""
        acts = self._acts.pop(key, None) or deque(maxlen=self.limit)
        self._acts[key] = acts
        if len(self._acts) > self.keys:
            self._acts.popitem(last=False)
        acts.append(time.monotonic())  # drops the oldest beyond `limit`


def _try_acquire_all(platform: str, limits: Sequence[tuple["MovingWindow", str]]) -> bool:
    """Count an act in all its limits (each a window and a key) if all allow it, else in none. Return whether they do."""
    if not all(window.has_room(f"{platform}:{key}") for window, key in limits):
        return False
    for window, key in limits:
        window.count(f"{platform}:{key}")
    return True
