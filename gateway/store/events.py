"""Every statement on jobs' events. Each function runs inside the caller's transaction."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, RowMapping, delete, func, insert, select

from gateway.store.ids import new_id
from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import events as _events
from gateway.store.tables import jobs as _jobs

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Event:
    id: str
    job_id: str
    created_at: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True)
class NewEvent:
    """An event to be added. A `source_key` that is there already means that it was added before."""

    message: str
    level: Level = "info"
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] | None = None
    created_at: int | None = None
    source_key: str | None = None


def insert_events(
    connection: Connection, job_id: str, events: Iterable[NewEvent], project_id: str | None = None
) -> None:
    """Appends events of the job's project; one whose `source_key` is there already is left out.

    Lists are by time, so an event is never older than the one before it, though a clock may jump back.
    """
    added = list(events)
    keys = [event.source_key for event in added if event.source_key is not None]
    known = (
        set(connection.scalars(select(_events.c.source_key).where(_events.c.source_key.in_(keys)))) if keys else set()
    )
    at_s = connection.scalar(select(func.max(_events.c.created_at)).where(_events.c.job_id == job_id)) or 0
    if project_id is None:
        project_id = connection.scalar(select(_jobs.c.project_id).where(_jobs.c.id == job_id))
    rows = []
    for event in added:
        if event.source_key is not None:
            if event.source_key in known:
                continue
            known.add(event.source_key)
        at_s = max(at_s, int(time.time()) if event.created_at is None else event.created_at)
        rows.append(
            {
                "id": new_id("ftevent-"),
                "project_id": project_id,
                "job_id": job_id,
                "created_at": at_s,
                "level": event.level,
                "type": event.type,
                "message": event.message,
                "data": event.data,
                "source_key": event.source_key,
            }
        )
    if rows:
        connection.execute(insert(_events), rows)


def select_events(
    connection: Connection, job_id: str, *, limit: int, after: str | None = None, order: Order = "desc"
) -> Page[Event]:
    """Events, newest first unless `order` is "asc"."""
    page = select_page(connection, _events, _events.c.job_id == job_id, limit=limit, after=after, order=order)
    return Page([_event(row) for row in page.items], page.has_more)


def select_metrics(connection: Connection, job_id: str) -> list[Event]:
    """The metrics events of a job in the order they came."""
    where = (_events.c.job_id == job_id, _events.c.type == "metrics")
    return [_event(row) for row in connection.execute(select(_events).where(*where).order_by(_events.c.seq)).mappings()]


def delete_undone_metrics(connection: Connection, job_id: str, attempt: int, first_step: int) -> None:
    """Forgets steps that an earlier attempt took and this one takes again, for it began at a checkpoint before them."""
    connection.execute(
        delete(_events).where(
            _events.c.job_id == job_id,
            _events.c.type == "metrics",
            _events.c.source_key.not_like(f"{job_id}/{attempt}/%"),
            _events.c.data["step"].as_integer() >= first_step,
        )
    )


def _event(row: RowMapping) -> Event:
    return Event(
        id=row["id"],
        job_id=row["job_id"],
        created_at=row["created_at"],
        level=row["level"],
        type=row["type"],
        message=row["message"],
        data=row["data"],
    )
