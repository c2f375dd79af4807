"""Which of our messages stand in a history that a client keeps itself."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

COLUMNS = ("message_id", "platform", "space", "person", "words")


def upgrade() -> None:
    table = op.create_table(
        "fingerprints",
        sa.Column("message_id", sa.String(length=64), nullable=False),
        sa.Column("platform", sa.String(length=32), nullable=False),
        sa.Column("space", sa.String(length=128), nullable=False),
        sa.Column("person", sa.String(length=128), nullable=False),
        sa.Column("words", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"]),
        sa.PrimaryKeyConstraint("message_id"),
    )
    op.create_index("fingerprints_of_words", "fingerprints", ["platform", "space", "words", "message_id"])
    said = sa.text(
        "SELECT m.id, c.platform, c.space, coalesce(asked.author_id, m.author_id), m.role, m.text FROM messages AS m "
        "JOIN conversations AS c ON c.id = m.conversation_id LEFT JOIN messages AS asked ON asked.id = m.reply_to "
        "WHERE c.platform = 'web' AND m.text <> ''"
    )
    rows = [
        dict(zip(COLUMNS, (*row[:4], _fingerprint(row[4], row[5])), strict=True))
        for row in op.get_bind().execute(said)
        if row[5].strip()
    ]
    if rows:
        op.bulk_insert(table, rows)


def downgrade() -> None:
    op.drop_table("fingerprints")


def _fingerprint(role: str, text: str) -> str:
    return hashlib.blake2b(f"{role}\0{' '.join(text.split())}".encode(), digest_size=16).hexdigest()
