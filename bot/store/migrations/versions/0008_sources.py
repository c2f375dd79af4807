"""What each answer was made from, and who taught each run."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

KEYS_OF_SHOWN = {
    "sqlite": "json_each(turns.shown) AS shown",
    "postgresql": "json_object_keys(turns.shown) AS shown(key)",
}


def upgrade() -> None:
    op.create_table(
        "sources",
        sa.Column("turn_id", sa.String(length=64), nullable=False),
        sa.Column("message_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["turn_id"], ["turns.id"]),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"]),
        sa.PrimaryKeyConstraint("turn_id", "message_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "run_teachers",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("platform", sa.String(length=32), nullable=False),
        sa.Column("user_id", sa.String(length=128), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"]),
        sa.PrimaryKeyConstraint("run_id", "platform", "user_id"),
    )
    op.execute(
        f"""
        INSERT INTO sources (turn_id, message_id)
        SELECT id, message_id FROM turns
        UNION
        SELECT turns.id, messages.id
        FROM turns CROSS JOIN {KEYS_OF_SHOWN[op.get_bind().dialect.name]} JOIN messages ON messages.id = shown.key
        """
    )
    op.create_index("sources_by_message", "sources", ["message_id"])
    op.execute(  # of runs whose feedback or messages were deleted since nothing more is known
        """
        INSERT INTO run_teachers (run_id, platform, user_id)
        WITH RECURSIVE answers (run_id, turn_id) AS (
            SELECT run_id, turn_id FROM (
                SELECT run_id, turn_id FROM run_feedback JOIN feedback ON feedback.id = feedback_id
                UNION
                SELECT run_id, turn_id FROM run_followups JOIN followups ON followups.message_id = run_followups.message_id
            ) AS judged
            UNION
            SELECT answers.run_id, turns.id
            FROM answers
            JOIN sources ON sources.turn_id = answers.turn_id
            JOIN turns ON turns.reply_id = sources.message_id
        ),
        wrote (run_id, message_id) AS (
            SELECT run_id, message_id FROM answers JOIN sources ON sources.turn_id = answers.turn_id
            UNION
            SELECT run_id, message_id FROM run_followups
        )
        SELECT run_id, platform, author_id
        FROM wrote
        JOIN messages ON messages.id = message_id
        JOIN conversations ON conversations.id = conversation_id
        WHERE role = 'user' AND author_id <> ''
        UNION
        SELECT run_id, platform, user_id
        FROM run_feedback
        JOIN feedback ON feedback.id = feedback_id
        JOIN turns ON turns.id = turn_id
        JOIN conversations ON conversations.id = conversation_id
        """
    )
    op.create_index("run_teachers_by_person", "run_teachers", ["platform", "user_id"])


def downgrade() -> None:
    op.drop_table("run_teachers")
    op.drop_table("sources")
