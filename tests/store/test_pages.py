"""Lists in pages: complete, ordered, and steady while rows come and go; and what clients may ask for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, create_engine, event, insert, update

from gateway.errors import RequestError
from gateway.store.pages import Order, select_page
from gateway.store.tables import files, metadata
from gateway.wire.page import PageQuery, list_body, parse_page


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    engine = create_engine("sqlite://")
    with engine.begin() as opened:
        metadata.create_all(opened)
        yield opened
    engine.dispose()


def add(connection: Connection, file_id: str, created_at: int) -> None:
    row = {"id": file_id, "created_at": created_at, "filename": "f", "purpose": "p", "size_bytes": 1, "digest": "d"}
    connection.execute(insert(files).values(**row))


def walk(connection: Connection, limit: int, order: Order) -> list[str]:
    seen: list[str] = []
    while True:
        page = select_page(connection, files, limit=limit, after=seen[-1] if seen else None, order=order)
        seen += [row["id"] for row in page.items]
        if not page.has_more:
            return seen


@settings(max_examples=60, deadline=None)
@given(times=st.lists(st.integers(0, 4), max_size=15), limit=st.integers(1, 6))
def test_pages_of_any_size_give_every_row_once_in_order(times: list[int], limit: int) -> None:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        metadata.create_all(connection)
        for n, created_at in enumerate(times):
            add(connection, f"f{n}", created_at)
        ascending = [f"f{n}" for n in sorted(range(len(times)), key=lambda n: (times[n], n))]
        assert walk(connection, limit, "asc") == ascending
        assert walk(connection, limit, "desc") == ascending[::-1]
    engine.dispose()


def test_rows_added_while_a_list_is_walked_move_nothing(connection: Connection) -> None:
    for n in range(5):
        add(connection, f"old-{n}", 100)
    first = select_page(connection, files, limit=2)
    for n in range(5):
        add(connection, f"new-{n}", 100 + n)
    rest = select_page(connection, files, limit=10, after=first.items[-1]["id"])
    assert [row["id"] for row in (*first.items, *rest.items)] == [f"old-{n}" for n in (4, 3, 2, 1, 0)]


def test_a_row_that_is_hidden_still_marks_its_place(connection: Connection) -> None:
    for n in range(4):
        add(connection, f"f{n}", n)
    connection.execute(update(files).where(files.c.id == "f2").values(deleted_at=9))
    page = select_page(connection, files, files.c.deleted_at.is_(None), limit=10, after="f2")
    assert [row["id"] for row in page.items] == ["f1", "f0"] and not page.has_more


def test_a_page_far_behind_is_found_through_the_index_and_not_by_walking(connection: Connection) -> None:
    for n in range(10):
        add(connection, f"f{n}", n)
    asked: list[tuple[str, object]] = []

    def note(_: object, __: object, statement: str, parameters: object, *___: object) -> None:
        asked.append((statement, parameters))

    event.listen(connection, "before_cursor_execute", note)
    for order in ("desc", "asc"):
        select_page(connection, files, files.c.project_id == "default", limit=3, after="f5", order=order)
        statement, parameters = asked[-1]
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)  # type: ignore[arg-type]
        (step,) = [row.detail for row in plan]
        assert re.search(r"USING INDEX ix_files_listed \(project_id=\? AND \(?created_at", step), step


def test_an_id_that_never_was_has_nothing_after_it(connection: Connection) -> None:
    add(connection, "f0", 0)
    page = select_page(connection, files, limit=10, after="f1")
    assert page.items == [] and not page.has_more


def test_a_query_is_read_with_the_defaults_of_its_list() -> None:
    assert parse_page({}) == PageQuery(20, None, "desc")
    assert parse_page({"limit": "7", "after": "x", "order": "asc"}) == PageQuery(7, "x", "asc")
    assert parse_page({}, default_limit=10, default_order="asc") == PageQuery(10, None, "asc")
    assert parse_page({"limit": "0", "after": "", "order": ""}) == PageQuery(0, None, "desc")


@pytest.mark.parametrize("limit", ["-1", "101", "1.5", "1e1", "ten", " 1", "٣", "9" * 5000, "true"])
def test_a_limit_that_is_no_number_in_its_bounds_is_refused(limit: str) -> None:
    with pytest.raises(RequestError, match="from 0 to 100") as caught:
        parse_page({"limit": limit})
    assert caught.value.param == "limit" and len(caught.value.message) < 200


def test_a_list_names_its_first_and_last() -> None:
    assert list_body([], False) == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    body = list_body([{"id": "a"}, {"id": "b"}], True)
    assert (body["first_id"], body["last_id"], body["has_more"]) == ("a", "b", True)
