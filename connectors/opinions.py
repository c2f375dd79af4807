"""Decide which opinions are recorded as they arrive, and count each of them once.

A platform may deliver an event twice, and its API may show a reaction before we get the event. The memory that detects
this is bounded and is not stored.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from bot.types import Feedback, now
from connectors.access import Access

MOST_WAITING = 256  # opinions that may wait to be written; more are shed, so that answers do not wait for a flood
MOST_REMEMBERED = 100_000  # reactions and events remembered to detect repeats; older ones are dropped

Reaction = tuple[str, str, str]  # message, user, emoji
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class ReactionSnapshot:
    """The reactions to the `messages` of one answer, as the platform's API showed them at `read_at`.

    `incomplete` holds the emoji with more reactions than listed people: a person who is not listed may have reacted.
    """

    messages: Collection[str]
    reactions: Collection[Reaction]
    read_at: datetime
    incomplete: Collection[str] = ()


class Opinions:
    """The opinions that arrive from one platform. Each is either recorded or counted in `Access.shed_count`."""

    def __init__(self, access: Access, platform: str):
        self._access, self._platform = access, platform
        self._waiting = 0
        self._writing: Counter[Reaction] = Counter()
        # When the last event of a reaction was shed, and whether it was a removal.
        self._shed: OrderedDict[Reaction, tuple[datetime, bool]] = OrderedDict()
        # Recorded from the API before the event came -> whether it was a removal.
        self._recorded_from_api: OrderedDict[Reaction, bool] = OrderedDict()
        self._events: OrderedDict[str, bool] = OrderedDict()  # event id -> whether it was shed

    @contextmanager
    def take(self, given: Feedback, message_id: str = "") -> Iterator[bool]:
        """Yield whether to record an opinion now. An opinion over the limit is counted as shed.

        `message_id` is that of the message with the reaction; "" if the opinion is not a reaction.
        """
        reaction = (message_id, given.user_id, given.signal)
        if self._recorded_from_api.pop(reaction, None) is given.retracts:
            yield False  # recorded from the API already
        elif self._waiting >= MOST_WAITING or not self._access.may_judge(self._platform, given.user_id):
            self._count_shed(reaction, given)
            yield False
        else:
            self._shed.pop(reaction, None)
            if given.event_id is not None:
                self._access.shed_count -= self._events.get(given.event_id, False)  # shed before, recorded now
                _put_bounded(self._events, given.event_id, False)
            self._waiting += 1
            self._writing[reaction] += 1
            try:
                yield True
            finally:
                self._waiting -= 1
                self._writing[reaction] -= 1
                if not self._writing[reaction]:
                    del self._writing[reaction]

    def claim(self, messages: Iterable[str], user: str, symbol: str, is_removal: bool, read_at: datetime) -> bool:
        """Return whether to record a reaction, or its removal, that the API showed at `read_at` on parts of one answer.

        False if an event of this reaction is being written or was shed after `read_at`: that event is newer or the
        same. A shed event no longer counts as shed if it says the same. A later event that says the same is ignored.
        """
        reactions = [(message, user, symbol) for message in messages]
        shed = [self._shed[one] for one in reactions if one in self._shed]
        if any(one in self._writing for one in reactions) or any(at > read_at for at, _ in shed):
            return False
        self._access.shed_count -= any(was_removal is is_removal for _, was_removal in shed)
        for one in reactions:
            self._shed.pop(one, None)
            _put_bounded(self._recorded_from_api, one, is_removal)
        return True

    def expect_new_event(self, reaction: Reaction) -> None:
        """Treat the next event of a reaction as new, because the reaction was cleared without an event of its own."""
        self._recorded_from_api.pop(reaction, None)

    def _count_shed(self, reaction: Reaction, given: Feedback) -> None:
        if given.event_id is not None:
            if given.event_id in self._events:
                return  # redelivered: it is recorded, being recorded, or counted
            _put_bounded(self._events, given.event_id, True)
        self._access.shed_count += 1
        if reaction[0]:
            _put_bounded(self._shed, reaction, (now(), given.retracts))


def _put_bounded(known: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MOST_REMEMBERED:
        known.popitem(last=False)
