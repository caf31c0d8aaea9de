"""Every statement on batches and the lines that they have done.

Its one rule: a line's result is stored once, whoever stores it, and a batch leaves a state only through a statement that
names it. What a kill leaves is the lines that are done; the others are done again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update

from gateway.store.pages import Page, select_page
from gateway.store.tables import DEFAULT_PROJECT, batch_lines, batches

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]

ACTIVE: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")


@dataclass(frozen=True)
class Batch:
    """A row of batches. `times` holds when a state was entered, by its name."""

    id: str
    created_at: int
    endpoint: str
    input_file_id: str
    input_digest: str
    completion_window: str
    expires_at: int
    key_id: str | None
    metadata: dict[str, str] | None
    output_expires_after_s: int | None
    project_id: str = DEFAULT_PROJECT
    status: Status = "validating"
    times: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] | None = None
    n_total: int = 0
    n_completed: int = 0
    n_failed: int = 0
    usage: dict[str, int] = field(default_factory=dict)
    model: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None


@dataclass(frozen=True)
class Line:
    """What became of a line: `text` is its line of the output file, or of the error file. `number` counts from 1."""

    number: int
    failed: bool
    text: str
    usage: dict[str, int] = field(default_factory=dict)


def insert_batch(connection: Connection, batch: Batch) -> None:
    connection.execute(insert(batches).values(**vars(batch)))


def select_batch(connection: Connection, batch_id: str, project_id: str | None = None) -> Batch | None:
    statement = select(batches).where(batches.c.id == batch_id)
    if project_id is not None:
        statement = statement.where(batches.c.project_id == project_id)
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else _batch(row)


def select_batches(connection: Connection, project_id: str, *, limit: int, after: str | None) -> Page[Batch]:
    """Newest first."""
    page = select_page(connection, batches, batches.c.project_id == project_id, limit=limit, after=after)
    return Page([_batch(row) for row in page.items], page.has_more)


def select_active(connection: Connection) -> list[Batch]:
    """All that are not over, oldest first."""
    statement = select(batches).where(batches.c.status.in_(ACTIVE)).order_by(batches.c.seq)
    return [_batch(row) for row in connection.execute(statement).mappings()]


def count_active(connection: Connection, project_id: str) -> int:
    where = (batches.c.project_id == project_id, batches.c.status.in_(ACTIVE))
    return connection.execute(select(func.count()).select_from(batches).where(*where)).scalar_one()


def move_batch(
    connection: Connection, batch_id: str, states: Collection[Status], status: Status, now: int, **values: Any
) -> bool:
    """Any of `states` → `status`. False when it was in none of them."""
    batch = select_batch(connection, batch_id)
    if batch is None or batch.status not in states:
        return False
    times = {**batch.times, status: now}
    connection.execute(update(batches).where(batches.c.id == batch_id).values(status=status, times=times, **values))
    return True


def store_lines(connection: Connection, batch_id: str, lines: Iterable[Line]) -> None:
    """Adds results; one that is there already stays as it is and is not counted again."""
    done = {line.number: line for line in lines}
    mine = batch_lines.c.batch_id == batch_id
    known = set(connection.scalars(select(batch_lines.c.number).where(mine, batch_lines.c.number.in_(list(done)))))
    new = [line for number, line in done.items() if number not in known]
    batch = select_batch(connection, batch_id)
    if not new or batch is None or batch.status not in ACTIVE:
        return
    connection.execute(
        insert(batch_lines),
        [
            {
                "project_id": batch.project_id,
                "batch_id": batch_id,
                "number": line.number,
                "failed": line.failed,
                "text": line.text,
            }
            for line in new
        ],
    )
    failed = sum(line.failed for line in new)
    usage = dict(batch.usage)
    for line in new:
        for name, count in line.usage.items():
            usage[name] = usage.get(name, 0) + count
    values = {"n_failed": batch.n_failed + failed, "n_completed": batch.n_completed + len(new) - failed, "usage": usage}
    connection.execute(update(batches).where(batches.c.id == batch_id).values(values))


def select_done(connection: Connection, batch_id: str) -> set[int]:
    """The numbers of the lines that are done."""
    return set(connection.scalars(select(batch_lines.c.number).where(batch_lines.c.batch_id == batch_id)))


def select_lines(
    connection: Connection, batch_id: str, *, failed: bool, after: int, limit: int
) -> list[tuple[int, str]]:
    """Number and text of results behind the line `after`, in the order of the input."""
    columns = select(batch_lines.c.number, batch_lines.c.text)
    where = (batch_lines.c.batch_id == batch_id, batch_lines.c.failed == failed, batch_lines.c.number > after)
    rows = connection.execute(columns.where(*where).order_by(batch_lines.c.number).limit(limit))
    return [(row.number, row.text) for row in rows]


def delete_lines(connection: Connection, batch_id: str) -> None:
    connection.execute(delete(batch_lines).where(batch_lines.c.batch_id == batch_id))


def _batch(row: RowMapping) -> Batch:
    values = {name: row[name] for name in Batch.__dataclass_fields__}
    return Batch(**{**values, "times": values["times"] or {}, "usage": values["usage"] or {}})
