"""Opinions as they arrive: decide which are recorded, and count each of them once.

A platform may deliver an event twice, and its API may show a reaction before we get the event. The memory that detects
this is bounded and is not stored. It knows no database.
"""

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from bot.types import Feedback, now
from connectors.access import Access

MOST_WAITING = (
    256  # opinions that may wait to be written; the rest of a flood is not counted, and answers do not wait for it
)
MOST_REMEMBERED = 100_000  # reactions and events that are known again; of more the oldest are forgotten

Reaction = tuple[str, str, str]  # message, user, emoji
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class ReactionSnapshot:
    """The reactions that a platform's API showed on the `messages` of one answer, when it was asked (`at`).

    `partial` holds the emoji of which it showed more reactions than people: who is not listed may have reacted all the same.
    """

    messages: Collection[str]
    reactions: Collection[Reaction]
    read_at: datetime
    incomplete: Collection[str] = ()


class Opinions:
    """The opinions that arrive from one platform, each recorded or counted in `Access.shed`, and never both."""

    def __init__(self, access: Access, platform: str):
        self._access, self._platform = access, platform
        self._waiting = 0
        self._writing: Counter[Reaction] = Counter()
        # When the last event of a reaction was shed, and whether it was a removal.
        self._shed: OrderedDict[Reaction, tuple[datetime, bool]] = OrderedDict()
        self._recorded_from_api: OrderedDict[Reaction, bool] = (
            OrderedDict()
        )  # recorded from the API, before its event: was it a removal?
        self._events: OrderedDict[str, bool] = OrderedDict()  # by id: was it shed?

    @contextmanager
    def take(self, given: Feedback, message_id: str = "") -> Iterator[bool]:
        """Yield whether to record an opinion now. One that is too many is counted as shed.

        `message_id` is that of the message with the reaction; "" for an opinion that is no reaction.
        """
        reaction = (message_id, given.user_id, given.signal)
        if self._recorded_from_api.pop(reaction, None) is given.retracts:
            yield False  # the API told of it first: it is recorded
        elif self._waiting >= MOST_WAITING or not self._access.may_judge(self._platform, given.user_id):
            self._count_shed(reaction, given)
            yield False
        else:
            self._shed.pop(reaction, None)
            if given.event_id is not None:
                self._access.shed_count -= self._events.get(given.event_id, False)  # it comes again, and is taken this time
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
        """Whether to record a reaction (or its removal) that the API showed, at `read_at`, on parts of one answer.

        Not if an event of this reaction is being written or was shed after `read_at`: that event is newer or the same. A
        shed event stops counting as shed when what it said is recorded here. A later event that says the same is ignored.
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
        """Take the next event of a reaction as new: it was cleared without an event of its own."""
        self._recorded_from_api.pop(reaction, None)

    def _count_shed(self, reaction: Reaction, given: Feedback) -> None:
        if given.event_id is not None:
            if given.event_id in self._events:
                return  # delivered again: it is recorded, being recorded, or counted
            _put_bounded(self._events, given.event_id, True)
        self._access.shed_count += 1
        if reaction[0]:
            _put_bounded(self._shed, reaction, (now(), given.retracts))


def _put_bounded(known: OrderedDict[Key, Value], key: Key, value: Value) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > MOST_REMEMBERED:
        known.popitem(last=False)
