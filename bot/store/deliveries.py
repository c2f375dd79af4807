"""Deliveries: record which platform message shows which part of which turn.

A reaction names a platform message, and feedback is about a turn. The records are durable, so that a reaction after a
restart finds its turn.
"""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.tables import conversations, deliveries, messages, turns
from bot.types import Conversation, now


@dataclass(frozen=True)
class Delivery:
    """One platform message that shows a turn or a part of it."""

    channel: str
    message_id: str
    turn_id: str


class Deliveries:
    """The stored deliveries."""

    def __init__(self, database: Database):
        self.database = database

    def add(self, platform: str, channel: str, message_id: str, turn_id: str, part: int) -> None:
        """Record that a message shows a part of a turn. The turn need not be stored yet."""
        row = {"platform": platform, "message_id": message_id, "channel": channel, "turn_id": turn_id, "part": part}
        with self.database.begin() as connection:
            connection.execute(deliveries.insert(), row | {"at": now()})

    def find_turn_id(self, platform: str, message_id: str) -> str | None:
        """Return the turn that a message shows, or None if the message is not ours."""
        key = (deliveries.c.platform == platform) & (deliveries.c.message_id == message_id)
        with self.database.read() as connection:
            return connection.execute(sa.select(deliveries.c.turn_id).where(key)).scalar_one_or_none()

    def find_last_turn_id(self, platform: str, channel: str) -> str | None:
        """Return the newest turn that was shown in a channel."""
        here = (deliveries.c.platform == platform) & (deliveries.c.channel == channel)
        query = sa.select(deliveries.c.turn_id).where(here).order_by(deliveries.c.turn_id.desc()).limit(1)
        with self.database.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    def find_first_question_event(self, place: Conversation) -> str | None:
        """Return the event of the first answered message in the conversation at a place, or None."""
        there = (conversations.c[name] == getattr(place, name) for name in ("platform", "space", "channel", "thread"))
        query = sa.select(messages.c.event_id).select_from(turns).join(conversations)
        query = query.join(messages, messages.c.id == turns.c.message_id).where(*there, messages.c.event_id.is_not(None))
        with self.database.read() as connection:
            return connection.execute(query.order_by(turns.c.at, turns.c.id).limit(1)).scalar_one_or_none()

    def read_since(self, platform: str, at: datetime, limit: int) -> list[Delivery]:
        """Return the newest `limit` deliveries after a time, newest first."""
        columns = [deliveries.c[name] for name in Delivery.__dataclass_fields__]
        query = sa.select(*columns).where(deliveries.c.platform == platform, deliveries.c.at > at)
        query = query.order_by(deliveries.c.at.desc()).limit(limit)
        with self.database.read() as connection:
            return [Delivery(**row._mapping) for row in connection.execute(query)]

    def find_first_shown_at(self, platform: str, turn_id: str) -> datetime | None:
        """Return when a turn was first shown, or None if no message shows it."""
        of_turn = (deliveries.c.platform == platform) & (deliveries.c.turn_id == turn_id)
        with self.database.read() as connection:
            return connection.execute(sa.select(sa.func.min(deliveries.c.at)).where(of_turn)).scalar_one()

    def is_shown(self, platform: str, turn_id: str) -> bool:
        """Return whether any message shows a turn."""
        of_turn = (deliveries.c.platform == platform) & (deliveries.c.turn_id == turn_id)
        with self.database.read() as connection:
            return connection.execute(sa.select(deliveries.c.message_id).where(of_turn).limit(1)).first() is not None
