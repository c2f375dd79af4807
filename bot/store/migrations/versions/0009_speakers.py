"""What people call who wrote a message."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("messages", sa.Column("author_name", sa.String(length=64), server_default="", nullable=False))


def downgrade() -> None:
    op.drop_column("messages", "author_name")
