"""Who wrote where, found without reading a channel through."""

from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_index("messages_of_authors", "messages", ["author_id", "conversation_id"])


def downgrade() -> None:
    op.drop_index("messages_of_authors", table_name="messages")
