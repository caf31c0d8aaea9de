"""Every statement on permissions: which other projects see a tuned model. A deleted one keeps its row, for lists' sake."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, insert, select, update

from gateway.store.ids import new_id
from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import permissions


@dataclass(frozen=True)
class Permission:
    """`project_id` may see `model`."""

    id: str
    created_at: int
    model: str
    project_id: str


def grant(connection: Connection, model: str, project_ids: list[str]) -> list[Permission]:
    """One for each project, new or as it was."""
    granted = []
    for project_id in dict.fromkeys(project_ids):
        where = (
            permissions.c.model == model,
            permissions.c.project_id == project_id,
            permissions.c.deleted_at.is_(None),
        )
        row = connection.execute(select(permissions).where(*where)).mappings().one_or_none()
        if row is None:
            values = {"id": new_id("cp_"), "created_at": int(time.time()), "model": model, "project_id": project_id}
            connection.execute(insert(permissions).values(values))
            row = connection.execute(select(permissions).where(*where)).mappings().one()
        granted.append(_permission(row))
    return granted


def select_permissions(
    connection: Connection, model: str, *, project_id: str | None, limit: int, after: str | None, order: Order
) -> Page[Permission]:
    where = [permissions.c.model == model, permissions.c.deleted_at.is_(None)]
    if project_id is not None:
        where.append(permissions.c.project_id == project_id)
    page = select_page(connection, permissions, *where, limit=limit, after=after, order=order)
    return Page([_permission(row) for row in page.items], page.has_more)


def withdraw(connection: Connection, model: str, permission_id: str) -> bool:
    """Whether there ever was one of that id for the model; it is withdrawn now or was before."""
    where = (permissions.c.id == permission_id, permissions.c.model == model)
    now = int(time.time())
    connection.execute(update(permissions).where(*where, permissions.c.deleted_at.is_(None)).values(deleted_at=now))
    return connection.scalar(select(permissions.c.seq).where(*where)) is not None


def projects_of(connection: Connection, model: str) -> set[str]:
    """The other projects that see a model."""
    where = (permissions.c.model == model, permissions.c.deleted_at.is_(None))
    return set(connection.scalars(select(permissions.c.project_id).where(*where)))


def _permission(row: RowMapping) -> Permission:
    return Permission(row["id"], row["created_at"], row["model"], row["project_id"])
