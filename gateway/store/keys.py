"""Every statement on keys. A key's secret is not here, only its sha256: what is lost cannot be shown again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, insert, select, update

from gateway.store.tables import DEFAULT_PROJECT, keys


@dataclass(frozen=True)
class KeyRow:
    """A key as it is stored; `digest` is the hexadecimal sha256 of the whole key."""

    id: str
    created_at: int
    name: str
    digest: str
    scopes: list[str]
    limits: dict[str, int]
    project_id: str = DEFAULT_PROJECT
    revoked_at: int | None = None


def insert_key(connection: Connection, key: KeyRow) -> None:
    connection.execute(insert(keys).values(**vars(key)))


def select_keys(connection: Connection) -> list[KeyRow]:
    """All that were ever made, oldest first, revoked ones too."""
    return [_key(row) for row in connection.execute(select(keys).order_by(keys.c.seq)).mappings()]


def revoke_key(connection: Connection, key_id: str) -> KeyRow | None:
    """The key, revoked now or before; None when there never was one."""
    where = keys.c.id == key_id
    connection.execute(update(keys).where(where, keys.c.revoked_at.is_(None)).values(revoked_at=int(time.time())))
    row = connection.execute(select(keys).where(where)).mappings().one_or_none()
    return None if row is None else _key(row)


def _key(row: RowMapping) -> KeyRow:
    values: dict[str, Any] = {name: row[name] for name in KeyRow.__dataclass_fields__}
    return KeyRow(**values)
