"""Every statement on responses.

Its one rule: a response leaves `queued` and `in_progress` only through `finish_response`, which has one winner: what was
cancelled stays cancelled, whoever is still writing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, insert, literal, select, update

from gateway.store.tables import responses

OPEN = ("queued", "in_progress")
MAX_CHAIN = 1000  # responses that one goes back through


@dataclass(frozen=True)
class ResponseRow:
    """A response: `items` is what came in with it, `body` the object as clients see it, `request` what was asked."""

    id: str
    project_id: str
    created_at: int
    previous_response_id: str | None
    status: str
    background: bool
    request: dict[str, Any]
    items: list[dict[str, Any]]
    body: dict[str, Any]

    @property
    def is_open(self) -> bool:
        return self.status in OPEN


class ChainBroken(Exception):
    """A response of the chain is not there (any more); `args[0]` is its id."""


def insert_response(connection: Connection, response: ResponseRow) -> None:
    connection.execute(insert(responses).values(**vars(response)))


def select_response(connection: Connection, response_id: str, project_id: str) -> ResponseRow | None:
    statement = select(responses).where(*_mine(response_id, project_id), responses.c.deleted_at.is_(None))
    row = connection.execute(statement).mappings().one_or_none()
    return None if row is None else _response(row)


def select_open(connection: Connection) -> list[ResponseRow]:
    """Responses in the background that are not over, oldest first, of every project."""
    where = (responses.c.status.in_(OPEN), responses.c.deleted_at.is_(None))
    return [
        _response(row)
        for row in connection.execute(select(responses).where(*where).order_by(responses.c.seq)).mappings()
    ]


def select_chain(connection: Connection, response_id: str, project_id: str) -> list[ResponseRow]:
    """The response and those before it, oldest first. Raises ChainBroken where one is missing or was deleted."""
    first = select(responses, literal(0).label("depth")).where(*_mine(response_id, project_id))
    walked = first.cte("walked", recursive=True)
    before = select(responses, (walked.c.depth + 1).label("depth")).where(
        responses.c.id == walked.c.previous_response_id,
        responses.c.project_id == project_id,
        walked.c.depth < MAX_CHAIN,
    )
    walked = walked.union_all(before)
    rows = connection.execute(select(walked).order_by(walked.c.depth)).mappings().all()
    wanted: str | None = response_id
    for row in rows:
        if row["deleted_at"] is not None:
            break
        wanted = row["previous_response_id"]
    if wanted is not None:
        raise ChainBroken(wanted)
    return [_response(row) for row in reversed(rows)]


def begin_response(connection: Connection, response_id: str, body: dict[str, Any]) -> bool:
    """queued → in_progress. False when it is over or deleted."""
    return _change(connection, response_id, "in_progress", body)


def finish_response(connection: Connection, response_id: str, status: str, body: dict[str, Any]) -> bool:
    """Ends an open response. False when it is over already, or deleted."""
    return _change(connection, response_id, status, body)


def cancel_response(connection: Connection, response_id: str, project_id: str) -> ResponseRow | None:
    """The response, cancelled if it was open; as it ended otherwise; None when there is none."""
    found = select_response(connection, response_id, project_id)
    if found is None or not found.is_open:
        return found
    body = found.body | {"status": "cancelled"}
    finish_response(connection, response_id, "cancelled", body)
    return replace(found, status="cancelled", body=body)


def delete_response(connection: Connection, response_id: str, project_id: str, *, now: int) -> bool:
    """Whether there is, or was, such a response. What was said is gone; deleting twice is fine."""
    mine = _mine(response_id, project_id)
    _erase(connection, [*mine, responses.c.deleted_at.is_(None)], now)
    return connection.scalar(select(responses.c.seq).where(*mine)) is not None


def delete_older(connection: Connection, created_before: int, *, now: int) -> None:
    """Deletes every response that is over and was made before that time."""
    where = [responses.c.created_at < created_before, responses.c.deleted_at.is_(None)]
    _erase(connection, [*where, responses.c.status.not_in(OPEN)], now)


def _change(connection: Connection, response_id: str, status: str, body: dict[str, Any]) -> bool:
    where = (responses.c.id == response_id, responses.c.status.in_(OPEN), responses.c.deleted_at.is_(None))
    return connection.execute(update(responses).where(*where).values(status=status, body=body)).rowcount == 1


def _erase(connection: Connection, where: Sequence[ColumnElement[bool]], now: int) -> None:
    gone = {"deleted_at": now, "request": {}, "items": [], "body": {}}
    connection.execute(update(responses).where(*where).values(**gone))


def _mine(response_id: str, project_id: str) -> list[ColumnElement[bool]]:
    return [responses.c.id == response_id, responses.c.project_id == project_id]


def _response(row: RowMapping) -> ResponseRow:
    return ResponseRow(**{name: row[name] for name in ResponseRow.__dataclass_fields__})
