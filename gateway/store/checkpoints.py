"""Every statement on jobs' checkpoints. Each function runs inside the caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, exists, insert, select, update

from gateway.store.ids import new_id
from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import checkpoints as _checkpoints
from gateway.store.tables import models as _models


@dataclass(frozen=True)
class Checkpoint:
    id: str
    job_id: str
    created_at: int
    step_number: int
    metrics: dict[str, Any]
    name: str


@dataclass(frozen=True)
class NewCheckpoint:
    created_at: int
    step_number: int
    metrics: dict[str, Any]
    name: str


def store_checkpoint(connection: Connection, job_id: str, project_id: str, checkpoint: NewCheckpoint) -> None:
    """One row a step: a step that is taken again keeps its id and name and gets the newer metrics."""
    where = (_checkpoints.c.job_id == job_id, _checkpoints.c.step_number == checkpoint.step_number)
    if connection.execute(update(_checkpoints).where(*where).values(metrics=checkpoint.metrics)).rowcount:
        return
    connection.execute(
        insert(_checkpoints).values(
            id=new_id("ftckpt_"),
            project_id=project_id,
            job_id=job_id,
            created_at=checkpoint.created_at,
            step_number=checkpoint.step_number,
            metrics=checkpoint.metrics,
            name=checkpoint.name,
        )
    )


def select_checkpoint_page(
    connection: Connection, job_id: str, *, limit: int, after: str | None = None, order: Order = "desc"
) -> Page[Checkpoint]:
    """Checkpoints, newest first unless `order` is "asc"; without those whose models were there and are deleted."""
    model = (_models.c.project_id == _checkpoints.c.project_id, _models.c.name == _checkpoints.c.name)
    where = (_checkpoints.c.job_id == job_id, ~exists().where(*model, _models.c.deleted_at.is_not(None)))
    page = select_page(connection, _checkpoints, *where, limit=limit, after=after, order=order)
    return Page([_checkpoint(row) for row in page.items], page.has_more)


def select_checkpoints(connection: Connection, job_id: str) -> list[Checkpoint]:
    """All checkpoints that a job ever had, by step."""
    statement = select(_checkpoints).where(_checkpoints.c.job_id == job_id).order_by(_checkpoints.c.step_number)
    return [_checkpoint(row) for row in connection.execute(statement).mappings()]


def _checkpoint(row: RowMapping) -> Checkpoint:
    return Checkpoint(
        id=row["id"],
        job_id=row["job_id"],
        created_at=row["created_at"],
        step_number=row["step_number"],
        metrics=row["metrics"],
        name=row["name"],
    )
