"""Vectors in a table of their own, by conversation, in eight bits; whether a place is public."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "embeddings",
        sa.Column("conversation_id", sa.String(length=64), nullable=False),
        sa.Column("message_id", sa.String(length=64), nullable=False),
        sa.Column("space", sa.String(length=128), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"]),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"]),
        sa.PrimaryKeyConstraint("conversation_id", "message_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("embeddings_of_messages", "embeddings", ["message_id"])
    op.create_index("messages_of_conversations", "messages", ["conversation_id", "id"])
    op.add_column("conversations", sa.Column("is_public", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.drop_column("messages", "embedding")  # made anew from the texts: the model is another, and so are the vectors
    op.drop_column("messages", "embedding_model")


def downgrade() -> None:
    op.add_column("messages", sa.Column("embedding", sa.LargeBinary(), nullable=True))
    op.add_column("messages", sa.Column("embedding_model", sa.String(length=128), nullable=True))
    op.drop_column("conversations", "is_public")
    op.drop_index("messages_of_conversations", "messages")
    op.drop_index("embeddings_of_messages", "embeddings")
    op.drop_table("embeddings")
