"""A SQLite file in which something was forgotten before is rebuilt once, because large files were not."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    connection = op.get_bind()
    if connection.dialect.name != "sqlite":
        return
    if connection.execute(sa.text("SELECT 1 FROM messages WHERE author_id = '' LIMIT 1")).first() is not None:
        switches = sa.table("switches", sa.column("name", sa.String()), sa.column("since", sa.DateTime()))
        op.bulk_insert(switches, [{"name": "rebuild due", "since": datetime.now(UTC).replace(tzinfo=None)}])


def downgrade() -> None:
    op.execute("DELETE FROM switches WHERE name = 'rebuild due'")
