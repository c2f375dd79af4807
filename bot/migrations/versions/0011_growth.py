"""Indices, so that nothing reads a whole table to find a few of its rows."""

from alembic import op

revision = "0011"
down_revision = "0010"

INDICES = (
    ("turns_in_time", "turns", ["at", "id"]),
    ("messages_in_time", "messages", ["at", "id"]),
    ("ix_feedback_user_id", "feedback", ["user_id"]),
    ("deliveries_in_channels", "deliveries", ["platform", "channel", "turn_id"]),
    ("ix_run_feedback_feedback_id", "run_feedback", ["feedback_id"]),
    ("ix_run_followups_message_id", "run_followups", ["message_id"]),
)


def upgrade() -> None:
    for name, table, columns in INDICES:
        op.create_index(name, table, columns)


def downgrade() -> None:
    for name, table, _ in INDICES:
        op.drop_index(name, table_name=table)
