"""The path of a version is not stored: a base model's is its name, and the others are in the data directory."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.drop_column("policies", "path")


def downgrade() -> None:
    op.add_column("policies", sa.Column("path", sa.Text(), nullable=False, server_default=""))
    op.execute("UPDATE policies SET path = base_model WHERE parent IS NULL")
