"""Forgetting: erase a person or a message, with everything that was made from their words (law 10).

A message keeps an empty row, so that its event is still recognized if it is delivered again. The answers that were made
from it are erased, because they may repeat its text, and so are the answers made from those, with all their feedback.
Forgetting a person also purges the policy versions that were trained on any of it. Messages in a platform's own channels
are not ours to delete. Erasures are recorded outside the database (`bot.store.erasures`), so that a backup does not bring
anything back.
"""

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from bot.store.database import Database
from bot.store.erasures import Erasures
from bot.store.rebuild import mark_rebuild_due
from bot.store.registry import PolicyRegistry
from bot.store.sources import find_answers_from
from bot.store.tables import (
    chunks,
    conversations,
    deliveries,
    embeddings,
    feedback,
    fingerprints,
    followups,
    messages,
    origins,
    run_feedback,
    run_followups,
    run_teachers,
    sources,
    turns,
    users,
    words,
)
from bot.store.users import has_decided_since, record_decision
from bot.types import FORGOTTEN, Person, PolicyState, Role, now
from bot.wording import count_noun

log = logging.getLogger(__name__)

UNFINISHED_SUFFIX = ".unfinished"  # of a version's directory during its run
SAMPLES_FILE = "samples.json"  # beside a version's weights: answers before and after its training
HEADS_DIRECTORY = "heads"  # in the data directory: the files of reward heads, with the ids of their teachers


@dataclass(frozen=True)
class ErasureCounts:
    """How many rows and versions an erasure removed."""

    messages: int
    answers: int
    opinions: int
    policies: int

    def __str__(self) -> str:
        return (
            f"gone: {count_noun(self.messages, 'message')}, {count_noun(self.answers, 'answer')}, "
            f"{count_noun(self.opinions, 'opinion')} and {count_noun(self.policies, 'policy version')}"
        )


def forget_person(
    database: Database, registry: PolicyRegistry, platform: str, user_id: str, until: datetime | None = None
) -> ErasureCounts:
    """Erase a person's messages and feedback, and everything that was made from either, in one transaction.

    Their consent is withheld from now on. `until` repeats an earlier request: what they said, taught and decided after that
    time is kept.
    """
    at = until or now()
    if database.directory is not None and until is None:
        Erasures(database.directory).add_person((platform, user_id), at)
    with database.begin() as connection:
        written = sa.select(messages.c.id).join(conversations)
        written = written.where(
            messages.c.author_id == user_id, messages.c.role == Role.USER, conversations.c.platform == platform
        )
        said = sa.select(feedback.c.id).join(turns, turns.c.id == feedback.c.turn_id).join(conversations)
        said = said.where(feedback.c.user_id == user_id, conversations.c.platform == platform)
        made = sa.select(origins.c.turn_id).join(turns, turns.c.id == origins.c.turn_id).join(conversations)
        made = made.where(origins.c.user_id == user_id, conversations.c.platform == platform)
        if until is not None:
            written, said = written.where(messages.c.at <= until), said.where(feedback.c.at <= until)
        erased = _erase_with_answers(connection, written, said, made)
        purged = registry.purge_taught(connection, (platform, user_id), until)
        is_newer = until is not None and has_decided_since(connection, (platform, user_id), until)
        record_decision(connection, (platform, user_id), **({} if is_newer else {"consent": False}), forgotten_at=at)
    database.run_after_commit(partial(remove_purged_files, registry))
    _remove_derived_files(database, registry)
    return replace(erased, policies=len(purged))


def forget_message(database: Database, message_id: str) -> ErasureCounts:
    """Erase one message that its author deleted. Versions that learned from it stay: one deletion must not purge them."""
    if database.directory is not None:
        Erasures(database.directory).add_message(message_id, now())
    with database.begin() as connection:
        erased = _erase_with_answers(connection, sa.select(messages.c.id).where(messages.c.id == message_id))
    _remove_derived_files(database, PolicyRegistry(database))
    return erased


def _remove_derived_files(database: Database, registry: PolicyRegistry) -> None:
    """After the commit, remove what was made from the erased rows beside the database, and their traces in its file."""
    database.run_after_commit(partial(remove_samples, registry))
    database.run_after_commit(partial(remove_heads, registry.directory.parent / HEADS_DIRECTORY))
    database.run_after_commit(database.scrub)


def forget_again(database: Database, registry: PolicyRegistry) -> int:
    """Forget again the recorded people and messages that an older database still has. Return how many there were."""
    if database.directory is None:
        return 0
    erasures = Erasures(database.directory)
    noted = erasures.read()
    with database.read() as connection:
        late = [
            one
            for ids in chunks(sorted(noted.messages))
            for one in connection.execute(_KEPT.where(messages.c.id.in_(ids))).scalars()
        ]
        known = {erasures.digest((row.platform, row.user_id)): row.forgotten_at for row in connection.execute(_FORGOTTEN)}
        wanted = {digest for digest, at in noted.people.items() if digest not in known or known[digest] < at}
    for message_id in late:
        forget_message(database, message_id)
    people = find_people(database) if wanted else set()
    found = sorted(person for person in people if erasures.digest(person) in wanted)
    for person in found:
        forget_person(database, registry, *person, until=noted.people[erasures.digest(person)])
    return len(late) + len(found)


def find_people(database: Database) -> set[Person]:
    """Return everybody who wrote, is behind an answer, gave feedback, taught a version, or decided about consent."""
    with database.read() as connection:
        return {(platform, user) for query in _PEOPLE for platform, user in connection.execute(query) if user != FORGOTTEN}


_KEPT = sa.select(messages.c.id).where(messages.c.author_id != FORGOTTEN)
_FORGOTTEN = sa.select(users).where(users.c.forgotten_at.is_not(None))
_PEOPLE = (
    sa.select(conversations.c.platform, messages.c.author_id).join(messages).where(messages.c.role == Role.USER).distinct(),
    sa.select(conversations.c.platform, feedback.c.user_id)
    .join(turns, turns.c.conversation_id == conversations.c.id)
    .join(feedback, feedback.c.turn_id == turns.c.id)
    .distinct(),
    sa.select(conversations.c.platform, origins.c.user_id)
    .join(turns, turns.c.conversation_id == conversations.c.id)
    .join(origins, origins.c.turn_id == turns.c.id)
    .distinct(),
    sa.select(run_teachers.c.platform, run_teachers.c.user_id).distinct(),
    sa.select(users.c.platform, users.c.user_id),
)


def remove_purged_files(registry: PolicyRegistry) -> None:
    """Remove the files of purged versions, also those that a crash left. Log what cannot be removed."""
    for name, path in registry.find_directories(PolicyState.PURGED).items():
        if Path(path).is_dir():
            try:
                shutil.rmtree(path)
            except OSError as error:
                log.error("%s was forgotten, but its files cannot be removed (%s); remove %s", name, error, path)


def remove_samples(registry: PolicyRegistry) -> None:
    """Remove the samples of all reports, because they contain held-out questions without their authors.

    The samples of unfinished runs go too. A run that writes some later checks for erasures itself.
    """
    for samples in [
        Path(f"{path}{end}") / SAMPLES_FILE
        for path in registry.find_directories().values()
        for end in ("", UNFINISHED_SUFFIX)
    ]:
        try:
            samples.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s may contain forgotten text and cannot be removed (%s); remove it", samples, error.strerror)


def remove_heads(directory: Path) -> None:
    """Remove the reward heads in a directory, because a head cannot be divided by its teachers."""
    for head in directory.glob("head-*.json*"):
        try:
            head.unlink(missing_ok=True)
        except OSError as error:
            log.error("%s may have learned from what is forgotten and cannot be removed (%s)", head, error.strerror)


def _erase_with_answers(
    connection: sa.Connection, written: sa.Select, said: sa.Select | None = None, turn_ids: sa.Select | None = None
) -> ErasureCounts:
    """Erase messages and turns, the answers made from them with their feedback, and the feedback that `said` selects."""
    own = list(connection.execute(written).scalars())
    opinions = [] if said is None else list(connection.execute(said).scalars())
    return erase_rows(connection, own, find_answers_from(connection, written, turn_ids), opinions)


def erase_rows(connection: sa.Connection, own: list[str], made: dict[str, str], said: Iterable[str] = ()) -> ErasureCounts:
    """Blank the messages `own`. Delete the answers `made` (reply ids by turn id), their feedback and the feedback `said`."""
    opinions = set(said)
    for ids in chunks(made):
        opinions.update(connection.execute(sa.select(feedback.c.id).where(feedback.c.turn_id.in_(ids))).scalars())
    for column, values in (
        (run_feedback.c.feedback_id, opinions),
        (run_followups.c.message_id, own),
        (feedback.c.id, opinions),
        (deliveries.c.turn_id, made),
        (followups.c.turn_id, made),
        (followups.c.message_id, own),
        (sources.c.turn_id, made),
        (origins.c.turn_id, made),
        (turns.c.id, made),
        (embeddings.c.message_id, [*own, *made.values()]),
        (words.c.message_id, [*own, *made.values()]),
        (fingerprints.c.message_id, [*own, *made.values()]),
        (messages.c.id, made.values()),
    ):
        for ids in chunks(values):
            connection.execute(column.table.delete().where(column.in_(ids)))
    blank = {"text": "", "author_id": FORGOTTEN, "author_name": ""}
    for ids in chunks(own):
        connection.execute(messages.update().where(messages.c.id.in_(ids)).values(**blank))
    if own or made or opinions:
        mark_rebuild_due(connection)
    return ErasureCounts(len(own), len(made), len(opinions), 0)
