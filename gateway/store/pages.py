"""One page of a list, read by key and not by offset: rows that are added meanwhile move nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import Column, ColumnElement, Connection, RowMapping, Select, Table, literal, select, tuple_

T = TypeVar("T")


Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Page(Generic[T]):
    items: list[T]
    has_more: bool


def select_page(
    connection: Connection,
    table: Table,
    *where: ColumnElement[bool],
    limit: int,
    after: str | None = None,
    order: Order = "desc",
    id_column: str = "id",
    by: str = "created_at",
) -> Page[RowMapping]:
    """At most `limit` rows of `table` that satisfy `where`, by (created_at, seq), newest first unless `order` is "asc".

    `by` names another column of times in created_at's place; rows that change it meanwhile move.

    The row named `after` gives only the place: it may have been deleted in the sense of `where`. A name that the table
    never held has nothing after it.
    """
    statement: Select[Any] = select(table).where(*where)
    created_at: Column[int] = table.c[by]
    seq: Column[int] = table.c.seq
    if after is not None:
        place = connection.execute(select(created_at, seq).where(table.c[id_column] == after)).one_or_none()
        if place is None:
            return Page([], has_more=False)
        statement = statement.where(_beyond(created_at, seq, place[0], place[1], order))
    if order == "desc":
        statement = statement.order_by(created_at.desc(), seq.desc())
    else:
        statement = statement.order_by(created_at, seq)
    rows = list(connection.execute(statement.limit(limit + 1)).mappings())
    return Page(rows[:limit], has_more=len(rows) > limit)


def _beyond(created_at: Column[int], seq: Column[int], at_s: int, at_seq: int, order: Order) -> ColumnElement[bool]:
    """Behind that place, as one comparison of rows: an index leads straight to it, which an OR would not let it."""
    place = tuple_(literal(at_s), literal(at_seq))
    return tuple_(created_at, seq) < place if order == "desc" else tuple_(created_at, seq) > place
