"""ConversationStore: store and read messages, turns and raw feedback.

It is synchronous; the event loop calls it through `Database.call`. It stores facts only. `learning.data.rewards` derives
rewards from them, and `bot.chat.tracker` chooses the messages of a prompt.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from bot.errors import DataError, ForgottenError
from bot.store import sources, word_index
from bot.store.database import Database
from bot.store.feedback import select_effective
from bot.store.tables import CHUNK, UTCDateTime, chunks, conversations, embeddings, feedback, followups, messages, turns
from bot.types import FORGOTTEN, Conversation, Feedback, FeedbackKind, FollowUp, Message, Role, StoredMessage, Turn

DialogueRecord = tuple[Conversation, list[Message], list[Turn], list[Feedback]]


class ConversationStore:
    """The stored messages, the answers to them, and the feedback on these."""

    def __init__(self, database: Database):
        self.database = database

    def open_conversation(self, conversation: Conversation) -> Conversation:
        """Return the stored conversation at this place. Create it if it is new."""
        with self.database.begin() as connection:
            row = connection.execute(_PLACE, vars(conversation)).one_or_none()
            if row is None:
                connection.execute(_INSERT[conversations], _to_columns(conversations, conversation))
                return conversation
            found = Conversation(**row._mapping)
            if found.is_public != conversation.is_public:  # a public place may have been closed since
                change = conversations.update().where(conversations.c.id == found.id)
                connection.execute(change.values(is_public=conversation.is_public))
            return replace(found, is_public=conversation.is_public)

    def read_conversation(self, conversation_id: str) -> Conversation:
        """Return a conversation by its id. Raises DataError if there is none."""
        with self.database.read() as connection:
            row = connection.execute(_PLACES.where(conversations.c.id == conversation_id)).one_or_none()
        if row is None:
            raise DataError(f"there is no conversation '{conversation_id}'; `kibitz state` lists the latest")
        return Conversation(**row._mapping)

    def find_latest_conversations(self, limit: int) -> list[tuple[Conversation, int, datetime]]:
        """Return the conversations with the newest messages: each with its count of messages and the time of the last."""
        last = sa.func.max(messages.c.at)
        query = _PLACES.add_columns(sa.func.count().label("messages"), last.label("last"))
        query = query.join(messages).group_by(conversations.c.id).order_by(last.desc()).limit(limit)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        names = Conversation.__dataclass_fields__
        return [(Conversation(**{name: getattr(row, name) for name in names}), row.messages, row.last) for row in rows]

    def add_message(self, message: Message) -> bool:
        """Commit a message. Return False if it, or its event, was committed before."""
        with self.database.begin() as connection:
            is_new = self._insert_once(messages, _to_message_row(message))
            if is_new:
                word_index.add(connection, [(message.id, message.text)])
        return is_new

    def add_message_at(self, place: Conversation, message: Message) -> StoredMessage:
        """Commit a message and, if it is new, its conversation, in one transaction."""
        with self.database.begin():
            place = self.open_conversation(place)
            message = replace(message, conversation_id=place.id)
            return StoredMessage(message, place, self.add_message(message))

    def add_earlier_messages(self, place: Conversation, said: Sequence[Message], until: datetime) -> None:
        """Commit the messages at a place (oldest first) with times before `until`, whatever the platform's clock says."""
        with self.database.begin():
            place = self.open_conversation(place)
            for number, message in enumerate(said, -len(said)):
                at = min(message.at, until + timedelta(microseconds=number))
                self.add_message(replace(message, conversation_id=place.id, at=at))

    def find_or_add_message(self, message: Message) -> tuple[Message, Turn | None]:
        """Commit a message. If it or its event was stored before, return the stored one and the answer to it, if any."""
        with self.database.read() as connection:
            row = connection.execute(_FIRST, {"id": message.id, "event_id": message.event_id}).one_or_none()
        if row is None:
            self.add_message(message)
            return message, None
        first = as_message(row)
        return first, self.find_answer(first.id)

    def edit_message(self, message_id: str, text: str, at: datetime) -> bool:
        """Store the new text of a message. Return False and change nothing if a later edit is stored already."""
        late = sa.or_(messages.c.edited_at.is_(None), messages.c.edited_at < at)
        change = messages.update().where(messages.c.id == message_id, messages.c.author_id != FORGOTTEN, late)
        with self.database.begin() as connection:
            is_newest = connection.execute(change.values(text=text, edited_at=at)).rowcount > 0
            if is_newest:
                connection.execute(embeddings.delete().where(embeddings.c.message_id == message_id))
                word_index.remove(connection, [message_id])
                word_index.add(connection, [(message_id, text)])
        return is_newest

    def add_turn(self, turn: Turn) -> None:
        """Commit an answer and its message, in one transaction.

        Raises ForgottenError, and stores nothing, if anything that the answer was made from was forgotten meanwhile.
        """
        with self.database.begin() as connection:
            there = connection.execute(_COUNT_KEPT, {"sources": list(turn.sources)}).scalar_one()
            if there < len(turn.sources):  # a forgotten answer has no row, a forgotten message an empty one
                raise ForgottenError("what this answers was forgotten meanwhile; the answer is not kept")
            reply = Message(
                turn.conversation_id, "kibitz", turn.text, Role.ASSISTANT, turn.message_id, at=turn.at, id=turn.reply_id
            )
            self.add_message(reply)
            connection.execute(_INSERT[turns], _to_columns(turns, turn))
            sources.add(connection, [turn])

    def add_feedback(self, given: Feedback) -> bool:
        """Append one act of feedback. Return False if its event was stored before. Raises DataError if there is no turn."""
        try:
            return self._insert_once(feedback, _to_columns(feedback, given))
        except IntegrityError as error:
            raise DataError(f"there is no turn '{given.turn_id}'") from error

    def add_dialogues(self, dialogues: Iterable[DialogueRecord]) -> None:
        """Commit imported conversations, all or none. Rows that exist already stay as they are."""
        left = iter(dialogues)
        with self.database.begin() as connection:
            while some := list(islice(left, CHUNK)):
                for number, table in enumerate((conversations, messages, turns, feedback)):
                    rows: list[Any] = [row for one in some for row in ([one[0]], *one[1:])[number]]
                    there = {
                        row.id for row in self._select_by_ids(sa.select(table.c.id), table.c.id, [row.id for row in rows])
                    }
                    fresh = list({row.id: row for row in reversed(rows) if row.id not in there}.values())[::-1]
                    if fresh:
                        row_of = _to_message_row if table is messages else partial(_to_columns, table)
                        connection.execute(_INSERT[table], list(map(row_of, fresh)))
                    word_index.add(connection, [(row.id, row.text) for row in fresh if isinstance(row, Message)])
                    sources.add(connection, [row for row in fresh if isinstance(row, Turn)])

    def find_turn(self, turn_id: str) -> Turn | None:
        """Return an answer by its id."""
        found = self._select_turns(turns.c.id == turn_id)
        return found[0] if found else None

    def find_answer(self, message_id: str) -> Turn | None:
        """Return the newest answer to a message."""
        found = self._select_turns(turns.c.message_id == message_id)
        return found[-1] if found else None

    def find_last_turn(self, conversation_id: str) -> Turn | None:
        """Return the newest answer in a conversation."""
        found = self._select_turns(turns.c.conversation_id == conversation_id, newest=1)
        return found[0] if found else None

    def find_last_turn_at(self, place: Conversation) -> Turn | None:
        """Return the newest answer in the conversation at a place."""
        with self.database.read() as connection:
            row = connection.execute(_PLACE, vars(place)).one_or_none()
        return None if row is None else self.find_last_turn(row.id)

    def find_message_of_event(self, event_id: str | None) -> Message | None:
        """Return the message that a platform's event brought."""
        with self.database.read() as connection:
            row = connection.execute(sa.select(*MESSAGE_COLUMNS).where(messages.c.event_id == event_id)).one_or_none()
        return None if row is None else as_message(row)

    def read_message(self, message_id: str) -> Message:
        """Return a message by its id, which must exist."""
        with self.database.read() as connection:
            return as_message(connection.execute(sa.select(*MESSAGE_COLUMNS).where(messages.c.id == message_id)).one())

    def find_question_events(self, turn_ids: Iterable[str]) -> dict[str, str]:
        """Return the event of the question of each turn, by turn id. Forgotten questions are left out."""
        query = sa.select(turns.c.id, messages.c.event_id).join(messages, messages.c.id == turns.c.message_id)
        query = query.where(messages.c.event_id.is_not(None), messages.c.author_id != FORGOTTEN)
        return {row.id: row.event_id for row in self._select_by_ids(query, turns.c.id, turn_ids)}

    def read_recent_messages(self, conversation_id: str, before: Message, limit: int) -> list[Message]:
        """Return the last `limit` messages before one, oldest first.

        Answers that were regenerated are left out. Answers that the asker corrected have the corrected text.
        """
        with self.database.read() as connection:
            values = {"place": conversation_id, "at": before.at, "before": before.id, "most": limit}
            rows = connection.execute(_RECENT, values).all()
        return self._apply_corrections([as_message(row) for row in reversed(rows)])

    def read_feedback_on(self, turn_ids: Iterable[str]) -> dict[str, list[Feedback]]:
        """Return all feedback on these turns, by turn id, oldest first."""
        found: dict[str, list[Feedback]] = defaultdict(list)
        query = sa.select(feedback).order_by(feedback.c.at, feedback.c.id)
        for row in self._select_by_ids(query, feedback.c.turn_id, turn_ids):
            found[row.turn_id].append(_as_feedback(row))
        return found

    def find_feedback(self, feedback_id: str) -> Feedback | None:
        """Return one act of feedback by its id."""
        with self.database.read() as connection:
            row = connection.execute(sa.select(feedback).where(feedback.c.id == feedback_id)).one_or_none()
        return None if row is None else _as_feedback(row)

    def find_turns_with_feedback(self, newest: int | None = None) -> list[Turn]:
        """Return all turns with feedback (or the `newest` ones), oldest first."""
        return self._select_turns(sa.exists().where(feedback.c.turn_id == turns.c.id), newest)

    def read_turns(self, turn_ids: Iterable[str]) -> list[Turn]:
        """Return these turns, oldest first."""
        found = [turn for ids in chunks(turn_ids) for turn in self._select_turns(turns.c.id.in_(ids))]
        return sorted(found, key=lambda turn: (turn.at, turn.id))

    def count_rows(self) -> dict[str, int]:
        """Return the number of conversations, messages, turns and acts of feedback, by table name."""
        with self.database.read() as connection:
            return {
                table.name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
                for table in (conversations, messages, turns, feedback)
            }

    def count_reactions(self, since: datetime | None = None, until: datetime | None = None) -> int:
        """Count the acts of feedback (`since` or `until` a time) that could teach: no retractions, ranks or comments."""
        query = _REACTIONS if since is None else _REACTIONS.where(feedback.c.at >= since)
        query = query if until is None else query.where(feedback.c.at <= until)
        with self.database.read() as connection:
            return connection.execute(query).scalar_one()

    def read_dialogues(self) -> Iterator[DialogueRecord]:
        """Yield every conversation with its messages, turns and feedback."""
        with self.database.read() as connection:
            found = connection.execute(_PLACES.order_by(conversations.c.id)).all()
        for row in found:
            conversation = Conversation(**row._mapping)
            answers = self._select_turns(turns.c.conversation_id == conversation.id)
            given = self.read_feedback_on(turn.id for turn in answers)
            yield (
                conversation,
                self.read_messages(conversation.id),
                answers,
                [one for all_ in given.values() for one in all_],
            )

    def read_messages(self, conversation_id: str, newest: int | None = None) -> list[Message]:
        """Return all messages of a conversation (or the `newest` ones), oldest first."""
        query = sa.select(*MESSAGE_COLUMNS).where(messages.c.conversation_id == conversation_id)
        query = query.order_by(messages.c.at.desc(), messages.c.id.desc()).limit(newest)
        with self.database.read() as connection:
            return [as_message(row) for row in connection.execute(query)][::-1]

    def find_messages(self, message_ids: Iterable[str]) -> dict[str, Message]:
        """Return the stored messages among these, by id."""
        return {
            row.id: as_message(row) for row in self._select_by_ids(sa.select(*MESSAGE_COLUMNS), messages.c.id, message_ids)
        }

    def find_authors_behind(self, turn_ids: Iterable[str]) -> dict[str, set[str]]:
        """Return the authors of everything that each turn was made from, directly or through other answers, by turn id."""
        with self.database.read() as connection:
            return sources.find_authors_behind(connection, turn_ids)

    def find_platforms(self, conversation_ids: Iterable[str]) -> dict[str, str]:
        """Return the platform of each conversation, by id."""
        query = sa.select(conversations.c.id, conversations.c.platform)
        return {row.id: row.platform for row in self._select_by_ids(query, conversations.c.id, conversation_ids)}

    def read_texts(self, message_ids: Iterable[str]) -> dict[str, str]:
        """Return the text of each message, by id."""
        query = sa.select(messages.c.id, messages.c.text)
        return {row.id: row.text for row in self._select_by_ids(query, messages.c.id, message_ids)}

    def find_first_followups(self, turn_ids: Iterable[str]) -> dict[str, tuple[FollowUp, Message]]:
        """Return the first follow-up of each turn with its message, by turn id."""
        query = sa.select(followups.c.turn_id, followups.c.chances, *MESSAGE_COLUMNS).join(messages)
        query = query.where(messages.c.text != "").order_by(messages.c.id.desc())
        rows = self._select_by_ids(query, followups.c.turn_id, turn_ids)
        return {row.turn_id: (FollowUp(row.turn_id, row.id, row.chances), as_message(row)) for row in rows}

    def _select_by_ids(self, query: sa.Select, column: sa.Column, ids: Iterable[str]) -> list[sa.Row]:
        """Return the rows of a query whose `column` is one of `ids`, in chunks that one statement can have."""
        with self.database.read() as connection:
            return [row for some in chunks(ids) for row in connection.execute(query.where(column.in_(some)))]

    def _insert_once(self, table: sa.Table, values: dict[str, Any]) -> bool:
        with self.database.begin() as connection:
            return connection.execute(_INSERT_ONCE[self.database.dialect, table], values).first() is not None

    def _select_turns(self, condition: sa.ColumnElement[bool], newest: int | None = None) -> list[Turn]:
        query = sa.select(turns, messages.c.text).join(messages, messages.c.id == turns.c.reply_id).where(condition)
        query = query.order_by(turns.c.at.desc(), turns.c.id.desc())
        with self.database.read() as connection:
            rows = connection.execute(query if newest is None else query.limit(newest)).all()
        return [_as_turn(row) for row in reversed(rows)]

    def _apply_corrections(self, said: list[Message]) -> list[Message]:
        replies = [message.id for message in said if message.role == Role.ASSISTANT]
        if not replies:
            return said
        with self.database.read() as connection:
            rows = connection.execute(_CORRECTIONS, {"replies": replies}).all()
        reply_of = {row.id: row.reply_id for row in rows}
        wanted = {reply_of[row.id]: row.text or "" for row in select_effective(_as_feedback(row) for row in rows)}
        return [replace(message, text=wanted[message.id]) if message.id in wanted else message for message in said]


_REACTIONS = (
    sa.select(sa.func.count())
    .select_from(feedback)
    .where(~feedback.c.retracts, feedback.c.kind.not_in([FeedbackKind.RANK, FeedbackKind.COMMENT]))
)
MESSAGE_COLUMNS = [messages.c[name] for name in Message.__dataclass_fields__]


# The statements of the hot path are built once, because building one costs more than running it.
_FIRST = sa.select(*MESSAGE_COLUMNS).where(
    sa.or_(messages.c.id == sa.bindparam("id"), messages.c.event_id == sa.bindparam("event_id"))
)
_later = turns.alias()
_superseded = (
    sa.select(turns.c.reply_id)
    .join(_later, _later.c.replaces == turns.c.id)
    .where(turns.c.conversation_id == sa.bindparam("place"))
)
_shown_before = sa.and_(
    messages.c.conversation_id == sa.bindparam("place"),
    sa.tuple_(messages.c.at, messages.c.id) < sa.tuple_(sa.bindparam("at", type_=UTCDateTime()), sa.bindparam("before")),
    messages.c.id.not_in(_superseded),
    messages.c.author_id != FORGOTTEN,
)
_COUNT_KEPT = (
    sa.select(sa.func.count())
    .select_from(messages)
    .where(messages.c.id.in_(sa.bindparam("sources", expanding=True)), messages.c.author_id != FORGOTTEN)
)
_RECENT = (
    sa.select(*MESSAGE_COLUMNS)
    .where(_shown_before)
    .order_by(messages.c.at.desc(), messages.c.id.desc())
    .limit(sa.bindparam("most"))
)
_CORRECTIONS = (
    sa.select(turns.c.reply_id, feedback)
    .join(feedback, feedback.c.turn_id == turns.c.id)
    .where(
        turns.c.reply_id.in_(sa.bindparam("replies", expanding=True)),
        feedback.c.kind == FeedbackKind.CORRECTION,
        feedback.c.user_id == turns.c.asker_id,
    )
)
_PLACES = sa.select(*(conversations.c[name] for name in Conversation.__dataclass_fields__))
_PLACE = _PLACES.where(*(conversations.c[name] == sa.bindparam(name) for name in ("platform", "space", "channel", "thread")))
_found = sa.select(conversations.c.scope).where(conversations.c.id == sa.bindparam("place")).scalar_subquery()
_scope = sa.func.coalesce(_found, 0)  # without a conversation the foreign key refuses the message
_INSERT = {table: table.insert() for table in (conversations, turns, feedback)} | {
    messages: messages.insert().values(scope=_scope)
}
_INSERT_ONCE = {  # an existing row stays as it is
    (dialect, table): made.on_conflict_do_nothing().returning(table.c.id)
    for dialect, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
    for table, made in ((messages, insert(messages).values(scope=_scope)), (feedback, insert(feedback)))
}


def _to_columns(table: sa.Table, row: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name in table.c}


def _to_message_row(message: Message) -> dict[str, Any]:
    return _to_columns(messages, message) | {"place": message.conversation_id}


def as_message(row: Any) -> Message:
    """Return the message in a row with MESSAGE_COLUMNS."""
    values = {name: getattr(row, name) for name in Message.__dataclass_fields__}
    return Message(**{**values, "role": Role(values["role"])})


def _as_feedback(row: Any) -> Feedback:
    values = {name: getattr(row, name) for name in Feedback.__dataclass_fields__}
    return Feedback(**{**values, "kind": FeedbackKind(values["kind"])})


def _as_turn(row: Any) -> Turn:
    values = {name: getattr(row, name) for name in Turn.__dataclass_fields__}
    for name in ("prompt_ids", "completion_ids", "logprobs"):
        values[name] = None if values[name] is None else tuple(values[name])
    return Turn(**values)
