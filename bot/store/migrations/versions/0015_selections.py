"""How the answer of a turn was chosen from several."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("turns", sa.Column("selection", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("turns", "selection")
