"""Every statement on stored chat completions. What was deleted is gone: its row stays, without what was said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, insert, select, update

from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import completions


@dataclass(frozen=True)
class Completion:
    """A row: `body` is the chat.completion without its metadata, `messages` what was asked."""

    id: str
    project_id: str
    created_at: int
    model: str
    metadata: dict[str, str] | None
    messages: list[dict[str, Any]]
    body: dict[str, Any]


def insert_completion(connection: Connection, completion: Completion) -> None:
    connection.execute(insert(completions).values(**vars(completion)))


def select_completion(connection: Connection, completion_id: str, project_id: str) -> Completion | None:
    statement = select(completions).where(*_mine(completion_id, project_id), completions.c.deleted_at.is_(None))
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else _completion(row)


def select_completions(
    connection: Connection,
    project_id: str,
    *,
    limit: int,
    after: str | None,
    order: Order,
    model: str | None = None,
    metadata: Mapping[str, str] | Literal["none"] | None = None,
    created_after: int | None = None,
    created_before: int | None = None,
) -> Page[Completion]:
    where: list[ColumnElement[bool]] = [completions.c.project_id == project_id, completions.c.deleted_at.is_(None)]
    if model is not None:
        where.append(completions.c.model == model)
    if metadata == "none":
        where.append(completions.c.metadata.is_(None))
    elif metadata is not None:
        where += [completions.c.metadata[key].as_string() == value for key, value in metadata.items()]
    if created_after is not None:
        where.append(completions.c.created_at > created_after)
    if created_before is not None:
        where.append(completions.c.created_at < created_before)
    page = select_page(connection, completions, *where, limit=limit, after=after, order=order)
    return Page([_completion(row) for row in page.items], page.has_more)


def update_metadata(
    connection: Connection, completion_id: str, project_id: str, metadata: dict[str, str] | None
) -> Completion | None:
    mine = [*_mine(completion_id, project_id), completions.c.deleted_at.is_(None)]
    connection.execute(update(completions).where(*mine).values(metadata=metadata))
    return select_completion(connection, completion_id, project_id)


def delete_completion(connection: Connection, completion_id: str, project_id: str, *, now: int) -> bool:
    """Whether there is, or was, such a completion: deleting twice is fine."""
    gone = {"deleted_at": now, "messages": [], "body": {}, "metadata": None}
    mine = _mine(completion_id, project_id)
    connection.execute(update(completions).where(*mine, completions.c.deleted_at.is_(None)).values(**gone))
    return connection.scalar(select(completions.c.seq).where(*mine)) is not None


def _mine(completion_id: str, project_id: str) -> list[ColumnElement[bool]]:
    return [completions.c.id == completion_id, completions.c.project_id == project_id]


def _completion(row: RowMapping) -> Completion:
    return Completion(**{name: row[name] for name in Completion.__dataclass_fields__})
