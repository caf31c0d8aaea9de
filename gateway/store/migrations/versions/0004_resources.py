"""Stored chat completions, responses, evals with their runs and output items."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_JSON = sa.JSON(none_as_null=True)


def upgrade() -> None:
    _create(
        "completions",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("metadata", _JSON),
        sa.Column("messages", _JSON, nullable=False),
        sa.Column("body", _JSON, nullable=False),
        sa.Column("deleted_at", sa.BigInteger()),
        indexes=[("ix_completions_listed", ["project_id", "created_at", "seq"])],
    )
    _create(
        "responses",
        sa.Column("previous_response_id", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("background", sa.Boolean(), nullable=False),
        sa.Column("request", _JSON, nullable=False),
        sa.Column("items", _JSON, nullable=False),
        sa.Column("body", _JSON, nullable=False),
        sa.Column("deleted_at", sa.BigInteger()),
        indexes=[
            ("ix_responses_listed", ["project_id", "created_at", "seq"]),
            ("ix_responses_status", ["status"]),
            ("ix_responses_created_at", ["created_at"]),
        ],
    )
    _create(
        "evals",
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("data_source_config", _JSON, nullable=False),
        sa.Column("testing_criteria", _JSON, nullable=False),
        sa.Column("metadata", _JSON),
        sa.Column("deleted_at", sa.BigInteger()),
        indexes=[("ix_evals_listed", ["project_id", "created_at", "seq"])],
    )
    _create(
        "eval_runs",
        sa.Column(
            "eval_id",
            sa.Text(),
            sa.ForeignKey("evals.id", ondelete="CASCADE", name="fk_eval_runs_eval_id"),
            nullable=False,
        ),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("data_source", _JSON, nullable=False),
        sa.Column("metadata", _JSON),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("error", _JSON),
        sa.Column("n_items", sa.Integer()),
        sa.Column("summary", _JSON),
        sa.Column("deleted_at", sa.BigInteger()),
        indexes=[
            ("ix_eval_runs_listed", ["eval_id", "created_at", "seq"]),
            ("ix_eval_runs_status", ["status"]),
        ],
    )
    _create(
        "eval_items",
        sa.Column(
            "run_id",
            sa.Text(),
            sa.ForeignKey("eval_runs.id", ondelete="CASCADE", name="fk_eval_items_run_id"),
            nullable=False,
        ),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("item", _JSON, nullable=False),
        sa.Column("sample", _JSON, nullable=False),
        sa.Column("results", _JSON, nullable=False),
        sa.Column("usage", _JSON, nullable=False),
        sa.UniqueConstraint("run_id", "number", name="uq_eval_items_run_id_number"),
        indexes=[("ix_eval_items_listed", ["run_id", "created_at", "seq"])],
    )


def downgrade() -> None:
    for table in ("eval_items", "eval_runs", "evals", "responses", "completions"):
        op.drop_table(table)


def _create(name: str, *columns: sa.schema.SchemaItem, indexes: Sequence[tuple[str, list[str]]]) -> None:
    """A table with what each has: seq, id, project_id, created_at."""
    op.create_table(
        name,
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), server_default="default", nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        *columns,
        sa.PrimaryKeyConstraint("seq", name=f"pk_{name}"),
        sa.UniqueConstraint("id", name=f"uq_{name}_id"),
        sqlite_autoincrement=True,
    )
    for index, of in indexes:
        op.create_index(index, name, of)
