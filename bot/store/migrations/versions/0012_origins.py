"""Who wrote what a turn was made from is kept where that is erased for its age, so that they can be forgotten later."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "origins",
        sa.Column("turn_id", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"]),
        sa.PrimaryKeyConstraint("turn_id", "user_id"),
        sqlite_with_rowid=False,
    )
    op.create_index("origins_of_people", "origins", ["user_id"])


def downgrade() -> None:
    op.drop_table("origins")
