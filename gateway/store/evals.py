"""Every statement on evals, their runs and the runs' output items.

Its one rule: a run leaves `queued` and `in_progress` through `finish_run`, which has one winner, and an item is added only to
a run that is in progress: what was canceled stays as it was then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, RowMapping, insert, select, update

from gateway.store.pages import Order, Page, select_page
from gateway.store.tables import eval_items as _items
from gateway.store.tables import eval_runs as _runs
from gateway.store.tables import evals as _evals

RunStatus = Literal["queued", "in_progress", "completed", "canceled", "failed"]
OPEN: tuple[RunStatus, ...] = ("queued", "in_progress")


@dataclass(frozen=True)
class Eval:
    id: str
    project_id: str
    created_at: int
    updated_at: int
    name: str
    data_source_config: dict[str, Any]
    testing_criteria: list[dict[str, Any]]
    metadata: dict[str, str] | None


@dataclass(frozen=True)
class EvalRun:
    """A run; `summary` is counted from its items while it is not over."""

    id: str
    project_id: str
    created_at: int
    eval_id: str
    name: str
    model: str
    data_source: dict[str, Any]
    metadata: dict[str, str] | None
    status: RunStatus
    error: dict[str, str] | None = None
    n_items: int | None = None
    summary: dict[str, Any] | None = None

    @property
    def is_open(self) -> bool:
        return self.status in OPEN


@dataclass(frozen=True)
class EvalItem:
    """What became of one line of a run's data; `usage` is by model, of reply and graders together."""

    id: str
    project_id: str
    created_at: int
    run_id: str
    number: int
    status: Literal["pass", "fail", "error"]
    item: dict[str, Any]
    sample: dict[str, Any]
    results: list[dict[str, Any]]
    usage: dict[str, dict[str, int]]


# evals


def insert_eval(connection: Connection, made: Eval) -> None:
    connection.execute(insert(_evals).values(**vars(made)))


def select_eval(connection: Connection, eval_id: str, project_id: str) -> Eval | None:
    where = [*_mine(_evals, eval_id, project_id), _evals.c.deleted_at.is_(None)]
    row = connection.execute(select(_evals).where(*where)).mappings().one_or_none()
    return None if row is None else _row(Eval, row)


def select_evals(
    connection: Connection, project_id: str, *, limit: int, after: str | None, order: Order, order_by: str
) -> Page[Eval]:
    where = (_evals.c.project_id == project_id, _evals.c.deleted_at.is_(None))
    page = select_page(connection, _evals, *where, limit=limit, after=after, order=order, by=order_by)
    return Page([_row(Eval, row) for row in page.items], page.has_more)


def update_eval(connection: Connection, eval_id: str, project_id: str, changes: Mapping[str, Any]) -> Eval | None:
    where = [*_mine(_evals, eval_id, project_id), _evals.c.deleted_at.is_(None)]
    connection.execute(update(_evals).where(*where).values(**changes))
    return select_eval(connection, eval_id, project_id)


def delete_eval(connection: Connection, eval_id: str, project_id: str, *, now: int) -> list[str] | None:
    """Hides an eval and its runs; the ids of the runs, None where there never was such an eval. Twice is fine."""
    mine = _mine(_evals, eval_id, project_id)
    if connection.scalar(select(_evals.c.seq).where(*mine)) is None:
        return None
    connection.execute(update(_evals).where(*mine, _evals.c.deleted_at.is_(None)).values(deleted_at=now))
    run_ids = list(connection.scalars(select(_runs.c.id).where(_runs.c.eval_id == eval_id)))
    for run_id in run_ids:
        delete_run(connection, eval_id, run_id, project_id, now=now)
    return run_ids


# runs


def insert_run(connection: Connection, run: EvalRun) -> None:
    connection.execute(insert(_runs).values(**vars(run)))


def select_run(connection: Connection, eval_id: str, run_id: str, project_id: str) -> EvalRun | None:
    where = [*_mine(_runs, run_id, project_id), _runs.c.eval_id == eval_id, _runs.c.deleted_at.is_(None)]
    row = connection.execute(select(_runs).where(*where)).mappings().one_or_none()
    return None if row is None else _row(EvalRun, row)


def select_runs(
    connection: Connection,
    eval_id: str,
    project_id: str,
    *,
    limit: int,
    after: str | None,
    order: Order,
    status: str | None,
) -> Page[EvalRun]:
    where = [_runs.c.eval_id == eval_id, _runs.c.project_id == project_id, _runs.c.deleted_at.is_(None)]
    if status is not None:
        where.append(_runs.c.status == status)
    page = select_page(connection, _runs, *where, limit=limit, after=after, order=order)
    return Page([_row(EvalRun, row) for row in page.items], page.has_more)


def select_open_runs(connection: Connection) -> list[EvalRun]:
    """Runs of every project that are not over, oldest first."""
    where = (_runs.c.status.in_(OPEN), _runs.c.deleted_at.is_(None))
    rows = connection.execute(select(_runs).where(*where).order_by(_runs.c.seq)).mappings()
    return [_row(EvalRun, row) for row in rows]


def begin_run(connection: Connection, run_id: str, n_items: int) -> bool:
    """queued → in_progress, or once more in progress after a restart. False when it is over or deleted."""
    return _change_open(connection, run_id, status="in_progress", n_items=n_items)


def finish_run(
    connection: Connection,
    run_id: str,
    status: RunStatus,
    summary: dict[str, Any],
    error: dict[str, str] | None = None,
) -> bool:
    """Ends an open run. False when it is over already, or deleted."""
    return _change_open(connection, run_id, status=status, summary=summary, error=error)


def delete_run(connection: Connection, eval_id: str, run_id: str, project_id: str, *, now: int) -> bool:
    """Hides a run, its data and its items. Whether there is, or was, such a run: twice is fine."""
    mine = [*_mine(_runs, run_id, project_id), _runs.c.eval_id == eval_id]
    if connection.scalar(select(_runs.c.seq).where(*mine)) is None:
        return False
    gone = {"deleted_at": now, "data_source": {}, "metadata": None}
    connection.execute(update(_runs).where(*mine, _runs.c.deleted_at.is_(None)).values(**gone))
    connection.execute(_items.delete().where(_items.c.run_id == run_id))
    return True


# output items


def insert_item(connection: Connection, item: EvalItem) -> bool:
    """Adds what became of a line. False when the run is over, or the line has an item."""
    open_ = (_runs.c.id == item.run_id, _runs.c.status == "in_progress", _runs.c.deleted_at.is_(None))
    taken = (_items.c.run_id == item.run_id, _items.c.number == item.number)
    if connection.scalar(select(_runs.c.seq).where(*open_)) is None:
        return False
    if connection.scalar(select(_items.c.seq).where(*taken)) is not None:
        return False
    connection.execute(insert(_items).values(**vars(item)))
    return True


def select_numbers(connection: Connection, run_id: str) -> set[int]:
    """The lines that have an item."""
    return set(connection.scalars(select(_items.c.number).where(_items.c.run_id == run_id)))


def select_outcomes(connection: Connection, run_id: str) -> list[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """(status, results, usage) of every item."""
    rows = connection.execute(
        select(_items.c.status, _items.c.results, _items.c.usage).where(_items.c.run_id == run_id)
    )
    return [(row.status, row.results, row.usage) for row in rows]


def select_item(connection: Connection, run_id: str, item_id: str, project_id: str) -> EvalItem | None:
    where = [*_mine(_items, item_id, project_id), _items.c.run_id == run_id]
    row = connection.execute(select(_items).where(*where)).mappings().one_or_none()
    return None if row is None else _row(EvalItem, row)


def select_items(
    connection: Connection,
    run_id: str,
    project_id: str,
    *,
    limit: int,
    after: str | None,
    order: Order,
    status: str | None,
) -> Page[EvalItem]:
    where = [_items.c.run_id == run_id, _items.c.project_id == project_id]
    if status is not None:
        where.append(_items.c.status == status)
    page = select_page(connection, _items, *where, limit=limit, after=after, order=order)
    return Page([_row(EvalItem, row) for row in page.items], page.has_more)


def _change_open(connection: Connection, run_id: str, **values: Any) -> bool:
    where = (_runs.c.id == run_id, _runs.c.status.in_(OPEN), _runs.c.deleted_at.is_(None))
    return connection.execute(update(_runs).where(*where).values(**values)).rowcount == 1


def _mine(table: Any, row_id: str, project_id: str) -> list[ColumnElement[bool]]:
    return [table.c.id == row_id, table.c.project_id == project_id]


def _row(kind: type[Any], row: RowMapping) -> Any:
    return kind(**{name: row[name] for name in kind.__dataclass_fields__})
