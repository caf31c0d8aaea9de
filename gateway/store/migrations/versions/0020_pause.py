"""Jobs that are paused."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020_pause"
down_revision = "0020_uploads"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("pause", sa.Text(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("pause")
