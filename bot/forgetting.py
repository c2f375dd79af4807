"""Forgetting: a person or a message is erased, with all that was made from their words (law 10).

Of a message only its place is left, so that its event, delivered again, is still known. Every answer that was made from
it goes (its policy was shown the text and may repeat it), every answer that was made from such an answer, and what
people said about them. With a person also the policy versions go that were trained on any of it. What stands in the
platform's own channels is not ours to delete. It knows no platform and no server: a running kibitz follows the registry.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from bot.database import Database
from bot.registry import PolicyRegistry
from bot.tables import (
    chunks,
    conversations,
    deliveries,
    embeddings,
    feedback,
    fingerprints,
    followups,
    messages,
    run_feedback,
    run_followups,
    turns,
)
from bot.types import FORGOTTEN, PolicyState, now
from bot.users import decide

SAMPLES = "samples.json"  # beside a version's weights: what was answered before and after its training


@dataclass(frozen=True)
class Erased:
    """How much is gone."""

    messages: int
    answers: int
    opinions: int
    policies: int

    def __str__(self) -> str:
        return (
            f"{self.messages} messages, {self.answers} answers, {self.opinions} opinions "
            f"and {self.policies} policy versions are gone"
        )


def forget_person(database: Database, registry: PolicyRegistry, platform: str, user_id: str) -> Erased:
    """Erase all that a person wrote, all that they said about answers, and all that was made from either.

    Their consent is withheld from now on. Nothing is half erased: it is one transaction.
    """
    with database.begin() as connection:
        theirs = sa.select(conversations.c.id).where(conversations.c.platform == platform)
        written = messages.c.author_id == user_id, messages.c.conversation_id.in_(theirs)
        own = list(connection.execute(sa.select(messages.c.id).where(*written)).scalars())
        answers, replies = _made_from(connection, own)
        said = sa.select(feedback.c.id).join(turns, turns.c.id == feedback.c.turn_id)
        said = said.where(feedback.c.user_id == user_id, turns.c.conversation_id.in_(theirs))
        opinions = set(connection.execute(said).scalars()) | _said_of(connection, feedback.c.id, answers)
        purged = registry.purge(connection, opinions, [*own, *_said_of(connection, followups.c.message_id, answers)])
        _erase(connection, own, answers, replies, opinions)
        decide(connection, (platform, user_id), consent=False, forgotten_at=now())
    database.afterwards(partial(remove_purged, registry))
    database.afterwards(partial(remove_samples, registry))
    database.afterwards(database.scrub)
    return Erased(len(own), len(answers), len(opinions), len(purged))


def forget_message(database: Database, message_id: str) -> Erased:
    """Erase one message, as its author deleted it. Versions that learned from it stay: one deletion must not move them."""
    with database.begin() as connection:
        answers, replies = _made_from(connection, [message_id])
        opinions = _said_of(connection, feedback.c.id, answers)
        _erase(connection, [message_id], answers, replies, opinions)
    database.afterwards(partial(remove_samples, PolicyRegistry(database)))
    database.afterwards(database.scrub)
    return Erased(1, len(answers), len(opinions), 0)


def remove_purged(registry: PolicyRegistry) -> None:
    """Remove the files of purged versions; also what a crash left behind."""
    for version in registry.all():
        if version.state == PolicyState.PURGED and Path(version.path).is_dir():
            shutil.rmtree(version.path)


def remove_samples(registry: PolicyRegistry) -> None:
    """Remove the samples that reports show: questions that were held out stand in them, and whose they are is not said."""
    for version in registry.all():
        if version.path:
            (Path(version.path) / SAMPLES).unlink(missing_ok=True)


def _made_from(connection: sa.Connection, message_ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """The turns that were made from these messages, directly or through other answers, and their reply messages.

    They may be anywhere in the space where something was said: what is said in one place may be remembered in another.
    """
    places: set[str] = set()
    there = conversations.alias()
    same = sa.and_(there.c.platform == conversations.c.platform, there.c.space == conversations.c.space)
    for ids in chunks(message_ids):
        query = sa.select(there.c.id).distinct().select_from(messages)
        query = query.join(conversations, conversations.c.id == messages.c.conversation_id).join(there, same)
        places.update(connection.execute(query.where(messages.c.id.in_(ids))).scalars())
    sources = set(message_ids)
    made: list[str] = []
    replies: list[str] = []
    for ids in chunks(sorted(places)):
        answers = sa.select(turns.c.id, turns.c.message_id, turns.c.reply_id, turns.c.shown)
        answers = answers.where(turns.c.conversation_id.in_(ids)).order_by(turns.c.at, turns.c.id)
        for row in connection.execute(answers):  # what an answer was shown came before it: one pass finds all
            if row.message_id in sources or not sources.isdisjoint(row.shown):
                sources.add(row.reply_id)
                made.append(row.id)
                replies.append(row.reply_id)
    return made, replies


def _said_of(connection: sa.Connection, column: sa.Column, answers: Iterable[str]) -> set[str]:
    """What was said about these answers: a column (the id) of `feedback` or `followups`."""
    found: set[str] = set()
    for ids in chunks(answers):
        found.update(connection.execute(sa.select(column).where(column.table.c.turn_id.in_(ids))).scalars())
    return found


def _erase(
    connection: sa.Connection, own: Sequence[str], answers: Sequence[str], replies: Sequence[str], opinions: Iterable[str]
) -> None:
    for column, values in (
        (run_feedback.c.feedback_id, opinions),
        (run_followups.c.message_id, own),
        (feedback.c.id, opinions),
        (deliveries.c.turn_id, answers),
        (followups.c.turn_id, answers),
        (followups.c.message_id, own),
        (turns.c.id, answers),
        (embeddings.c.message_id, [*own, *replies]),
        (fingerprints.c.message_id, [*own, *replies]),
        (messages.c.id, replies),
    ):
        for ids in chunks(values):
            connection.execute(column.table.delete().where(column.in_(ids)))
    blank = {"text": "", "author_id": FORGOTTEN}
    for ids in chunks(own):
        connection.execute(messages.update().where(messages.c.id.in_(ids)).values(**blank))
