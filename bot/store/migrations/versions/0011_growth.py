"""Scopes, the words that messages are found by, and indices, so that nothing is read whole to find a few of its rows."""

import sqlalchemy as sa
from alembic import op

from bot.store import word_index
from bot.store.tables import CHUNK, compute_scope

revision = "0011"
down_revision = "0010"

INDICES = (
    ("turns_in_time", "turns", ["at", "id"]),
    ("messages_of_scopes", "messages", ["scope", "id"]),
    ("messages_of_authors", "messages", ["author_id", "scope"]),
    ("conversations_of_spaces", "conversations", ["platform", "space", "is_public", "scope"]),
    ("feedback_of_people", "feedback", ["user_id", "turn_id"]),
    ("deliveries_in_channels", "deliveries", ["platform", "channel", "turn_id"]),
    ("ix_run_feedback_feedback_id", "run_feedback", ["feedback_id"]),
    ("ix_run_followups_message_id", "run_followups", ["message_id"]),
)
REPLACED = (
    ("messages_of_conversations", "messages", ["conversation_id", "id"]),
    ("messages_of_authors", "messages", ["author_id", "conversation_id"]),
)


def upgrade() -> None:
    for name, table, _ in REPLACED:
        op.drop_index(name, table_name=table)
    for table in ("conversations", "messages"):
        op.add_column(table, sa.Column("scope", sa.BigInteger(), server_default="0", nullable=False))
    op.create_table(
        "words",
        sa.Column("scope", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("word", sa.String(length=64), nullable=False),
        sa.Column("message_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"]),
        sa.PrimaryKeyConstraint("scope", "word", "message_id"),
        sqlite_with_rowid=False,
    )
    connection = op.get_bind()
    channels = connection.execute(sa.text("SELECT DISTINCT platform, space, channel FROM conversations")).all()
    where = sa.text(
        "UPDATE conversations SET scope = :scope WHERE platform = :platform AND space = :space AND channel = :channel"
    )
    for channel in channels:
        connection.execute(where, {**channel._mapping, "scope": compute_scope(*channel)})
    op.execute("UPDATE messages SET scope = (SELECT scope FROM conversations WHERE conversations.id = conversation_id)")
    for name, table, columns in INDICES:
        op.create_index(name, table, columns)
    kept = sa.text("author_id <> ''")
    op.create_index("messages_in_time", "messages", ["at", "id"], sqlite_where=kept, postgresql_where=kept)
    after = ""
    said = sa.text("SELECT id, text FROM messages WHERE id > :after ORDER BY id LIMIT :most")
    while rows := connection.execute(said, {"after": after, "most": CHUNK}).all():
        word_index.add(connection, [(row.id, row.text) for row in rows])
        after = rows[-1].id
    op.create_index("words_of_messages", "words", ["message_id"])


def downgrade() -> None:
    op.drop_table("words")
    op.drop_index("messages_in_time", table_name="messages")
    for name, table, _ in INDICES:
        op.drop_index(name, table_name=table)
    for table in ("conversations", "messages"):
        op.drop_column(table, "scope")
    for name, table, columns in REPLACED:
        op.create_index(name, table, columns)
