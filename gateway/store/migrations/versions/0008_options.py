"""Options of jobs, and jobs that go on from tuned models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("options", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("named_base", sa.Text(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("named_base")
        jobs.drop_column("options")
