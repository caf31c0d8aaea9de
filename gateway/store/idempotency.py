"""Every statement on Idempotency-Keys: which object a key made. Used inside the transaction that makes the object.

So a request that is sent again, also after a kill between the commit and its answer, finds what the first one made.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import orjson
from sqlalchemy import Connection, and_, delete, insert, or_, select

from gateway.errors import RequestError
from gateway.store.tables import idempotency

KEPT_S = 7 * 86_400


def fingerprint(*asked: Any) -> str:
    """What was asked, in short: equal requests have equal ones."""
    return hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS, default=vars)).hexdigest()


def recall(connection: Connection, project_id: str, key: str | None, asked: str) -> str | None:
    """The id of what an earlier request with this key made. RequestError when that one asked for something else."""
    if key is None:
        return None
    where = (idempotency.c.project_id == project_id, idempotency.c.key == key)
    row = connection.execute(select(idempotency).where(*where)).one_or_none()
    if row is None or row.created_at < time.time() - KEPT_S:
        return None
    if row.fingerprint != asked:
        raise RequestError(
            f"The Idempotency-Key {key!r} was used for {row.object_id} with other parameters. Use a new key for another "
            "request.",
            param="Idempotency-Key",
        )
    return str(row.object_id)


def remember(connection: Connection, project_id: str, key: str | None, asked: str, object_id: str) -> None:
    """Notes that `key` made the object, in place of what it made before; keys are forgotten after KEPT_S."""
    if key is None:
        return
    now = int(time.time())
    earlier = and_(idempotency.c.project_id == project_id, idempotency.c.key == key)
    connection.execute(delete(idempotency).where(or_(earlier, idempotency.c.created_at < now - KEPT_S)))
    connection.execute(
        insert(idempotency).values(
            project_id=project_id, key=key, fingerprint=asked, object_id=object_id, created_at=now
        )
    )
