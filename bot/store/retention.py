"""Retention: erase messages that are older than `privacy.retention_days`.

Text and opinions are erased as when a person is forgotten. A younger answer whose prompt had an older message is kept, but
its token ids are erased, because they contain the older text, and so are the texts of its candidates. The authors of that
text are recorded, so that they can still be forgotten. Versions that learned from erased messages stay, with the record of
their teachers.
"""

from collections.abc import Awaitable, Callable, Collection
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.forgetting import erase_rows, remove_samples
from bot.store.registry import PolicyRegistry
from bot.store.sources import keep_origins
from bot.store.tables import UTCDateTime, messages, sources, turns
from bot.types import now

ERASE_SECONDS = 3600.0  # seconds between two erasures
BATCH_SIZE = 32  # messages in one transaction, so that nobody waits long for the database

OnErased = Callable[[Collection[str]], Awaitable[None]]


async def erase_expired(database: Database, days: int, tell: OnErased) -> None:
    """Erase messages older than `days` (0 keeps all). Call `tell` with the ids of the erased messages."""
    if not days:
        return
    before = now() - timedelta(days=days)
    gone: list[str] = []
    while some := await database.call(erase_before, database, before, BATCH_SIZE):
        gone += some
    if gone:
        await tell(gone)
        await database.call(remove_samples, PolicyRegistry(database))
        await database.call(database.scrub)


def erase_before(database: Database, before: datetime, limit: int) -> list[str]:
    """Erase the `limit` oldest messages from before a time, in one transaction. Return their ids."""
    with database.begin() as connection:
        rows = connection.execute(_OLDEST, {"before": before, "most": limit}).all()
        ids = [row.id for row in rows]
        if not ids:
            return []
        made = {row.id: row.reply_id for row in connection.execute(_ANSWERS, {"ids": ids})}
        # A younger answer that was shown any of these is kept, without its token ids.
        of_these = sources.c.message_id.in_([*ids, *made.values()])
        spelt = turns.c.id.in_(sa.select(sources.c.turn_id).where(of_these)) & turns.c.id.not_in(list(made))
        keep_origins(connection, connection.execute(sa.select(turns.c.id).where(spelt)).scalars().all())
        connection.execute(turns.update().where(spelt).values(dict.fromkeys(_IDS, sa.null())))
        selected = sa.select(turns.c.id, turns.c.selection).where(spelt, turns.c.selection.is_not(None))
        for row in connection.execute(selected).all():
            change = turns.update().where(turns.c.id == row.id)
            connection.execute(change.values(selection=row.selection.without_texts()))
        connection.execute(sources.delete().where(sources.c.message_id.in_(list(made.values()))))
        replies = set(made.values())
        erase_rows(connection, [one for one in ids if one not in replies], made)
    return sorted({*ids, *replies})


_IDS = ("prompt_ids", "completion_ids", "logprobs")
_OLDEST = (
    sa.select(messages.c.id)
    .where(messages.c.at < sa.bindparam("before", type_=UTCDateTime()), sa.text("messages.author_id <> ''"))
    .order_by(messages.c.at, messages.c.id)
    .limit(sa.bindparam("most"))
)
_of_ids: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_ANSWERS = sa.select(turns.c.id, turns.c.reply_id).where(turns.c.message_id.in_(_of_ids) | turns.c.reply_id.in_(_of_ids))
