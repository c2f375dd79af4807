"""Users: store and read people's decisions about consent.

Only people who consent may teach (law 7). `privacy.consent` holds for people without a decision.
"""

from collections.abc import Iterable
from datetime import datetime

import sqlalchemy as sa

from bot.config import PrivacyConfig, WebConfig
from bot.store.database import Database
from bot.store.tables import users
from bot.types import Person, now


class Users:
    """The people who made a decision."""

    def __init__(self, database: Database, config: PrivacyConfig):
        self.database = database
        self.is_consent_assumed = config.consent == "assumed"

    def has_consent(self, platform: str, user_id: str) -> bool:
        """Return whether kibitz may learn from a person."""
        return self.read_decisions().get((platform, user_id), self.is_consent_assumed)

    def filter_consenting(self, platform: str, user_ids: Iterable[str]) -> set[str]:
        """Return the people among these whom kibitz may learn from."""
        decided = self.read_decisions()
        return {one for one in user_ids if decided.get((platform, one), self.is_consent_assumed)}

    def record_consent(self, platform: str, user_id: str, consent: bool) -> None:
        """Record a person's consent or refusal. The last decision holds."""
        with self.database.begin() as connection:
            record_decision(connection, (platform, user_id), consent=consent)

    def read_decisions(self) -> dict[Person, bool]:
        """Return the consent of everybody who made a decision."""
        with self.database.read() as connection:
            rows = connection.execute(sa.select(users.c.platform, users.c.user_id, users.c.consent))
            return {(row.platform, row.user_id): row.consent for row in rows}

    def find_forgotten_since(self, platform: str, at: datetime) -> set[str]:
        """Return everybody on a platform who was forgotten at a time or later."""
        gone = (users.c.platform == platform) & (users.c.forgotten_at >= at)
        with self.database.read() as connection:
            return set(connection.execute(sa.select(users.c.user_id).where(gone)).scalars())


def resolve_voice(platform: str, user_id: str, config: WebConfig) -> str:
    """Return the id that a person counts as in training, where nobody may count more than once (law 7).

    Web clients name their users themselves, as "TOKEN'S NAME/PERSON". Unless the operator trusts those names, everybody
    behind one token counts as one person. For consent and forgetting each of them is a person of their own.
    """
    return user_id if platform != "web" or config.trust_user_names else user_id.partition("/")[0]


def has_decided_since(connection: sa.Connection, person: Person, at: datetime) -> bool:
    """Return whether a person decided about their consent after a time."""
    return bool(connection.execute(sa.select(sa.exists().where(_is_person(person), users.c.at > at))).scalar_one())


def record_decision(connection: sa.Connection, person: Person, **values: object) -> None:
    """Store a person's decision in the transaction of `connection`."""
    if not connection.execute(users.update().where(_is_person(person)).values(at=now(), **values)).rowcount:
        connection.execute(users.insert().values(platform=person[0], user_id=person[1], at=now(), **values))


def _is_person(person: Person) -> sa.ColumnElement[bool]:
    return (users.c.platform == person[0]) & (users.c.user_id == person[1])
