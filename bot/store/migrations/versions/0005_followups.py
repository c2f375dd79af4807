"""What people said next, as something said about the answer before it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "followups",
        sa.Column("message_id", sa.String(length=64), nullable=False),
        sa.Column("turn_id", sa.String(length=64), nullable=False),
        sa.Column("chances", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"]),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"]),
        sa.PrimaryKeyConstraint("message_id"),
    )
    op.create_index("followups_of_turns", "followups", ["turn_id"])
    op.create_index("turns_in_order", "turns", ["conversation_id", "at", "id"])


def downgrade() -> None:
    op.drop_index("turns_in_order", "turns")
    op.drop_table("followups")
