"""Deliveries: which platform message shows which part of which turn.

A reaction names a message; what it is about is the turn. The ledger is durable, so that a reaction after a restart finds
its turn. It knows no platform's client.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from bot.database import Database, deliveries
from bot.types import now


@dataclass(frozen=True)
class Delivery:
    """One message that shows a part of a turn, or all of it."""

    channel: str
    message_id: str
    turn_id: str
    part: int


class Deliveries:
    """The ledger of what was posted where."""

    def __init__(self, database: Database):
        self.database = database

    def add(self, platform: str, channel: str, message_ids: Sequence[str], turn_id: str, first_part: int = 0) -> None:
        """Record that these messages show consecutive parts of a turn, which may still be growing."""
        rows = [
            {"platform": platform, "message_id": one, "channel": channel, "turn_id": turn_id, "part": part, "at": now()}
            for part, one in enumerate(message_ids, start=first_part)
        ]
        if rows:
            with self.database.begin() as connection:
                connection.execute(deliveries.insert(), rows)

    def turn_of(self, platform: str, message_id: str) -> str | None:
        """The turn that a message shows a part of; None where the message is not ours."""
        key = (deliveries.c.platform == platform) & (deliveries.c.message_id == message_id)
        with self.database.read() as connection:
            return connection.execute(sa.select(deliveries.c.turn_id).where(key)).scalar_one_or_none()

    def last_turn(self, platform: str, channel: str) -> str | None:
        """The newest turn that was shown in a channel."""
        here = (deliveries.c.platform == platform) & (deliveries.c.channel == channel)
        query = sa.select(deliveries.c.turn_id).where(here).order_by(deliveries.c.turn_id.desc()).limit(1)
        with self.database.read() as connection:
            return connection.execute(query).scalar_one_or_none()

    def since(self, platform: str, at: datetime, limit: int) -> list[Delivery]:
        """The newest `limit` messages that were shown after a time, newest first."""
        columns = [deliveries.c[name] for name in Delivery.__dataclass_fields__]
        query = sa.select(*columns).where(deliveries.c.platform == platform, deliveries.c.at > at)
        query = query.order_by(deliveries.c.at.desc()).limit(limit)
        with self.database.read() as connection:
            return [Delivery(**row._mapping) for row in connection.execute(query)]

    def messages_of(self, platform: str, turn_id: str) -> list[str]:
        """The messages that show a turn, in order."""
        query = (
            sa.select(deliveries.c.message_id)
            .where(deliveries.c.platform == platform, deliveries.c.turn_id == turn_id)
            .order_by(deliveries.c.part)
        )
        with self.database.read() as connection:
            return list(connection.execute(query).scalars())
