"""Every statement on usage: a row a minute, project, key, model and kind of request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from gateway.store.tables import usage

Kind = Literal["completions", "embeddings"]


class Slot(NamedTuple):
    """What is counted together; `minute` is the unix second that it begins with, `key_id` empty where there was none."""

    minute: int
    project_id: str
    key_id: str
    model: str
    kind: Kind
    is_batch: bool


@dataclass
class Count:
    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0

    def add(self, other: Count) -> None:
        self.requests += other.requests
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cached_tokens += other.cached_tokens


def add_counts(connection: Connection, counts: Mapping[Slot, Count]) -> None:
    """Adds to what the slots hold."""
    for slot, count in counts.items():
        where = [usage.c[name] == value for name, value in slot._asdict().items()]
        added = {name: usage.c[name] + value for name, value in vars(count).items()}
        if not connection.execute(update(usage).where(*where).values(added)).rowcount:
            connection.execute(insert(usage).values(**slot._asdict(), **vars(count)))


GROUPS = ("project_id", "key_id", "model", "is_batch")


def sum_counts(
    connection: Connection,
    kind: Kind,
    begin: int,
    end: int,
    *,
    width_s: int,
    group_by: Collection[str] = (),
    wanted: Mapping[str, Collection[Any]] | None = None,
) -> list[RowMapping]:
    """Sums from `begin` to before `end`, a row a `bucket` (of `width_s`, counted from `begin`) and group of GROUPS.

    `wanted`: the values that a column may have.
    """
    offset = usage.c.minute - begin
    bucket = (offset - offset % width_s).label("bucket")
    groups = [usage.c[name] for name in GROUPS if name in group_by]
    where = [usage.c.kind == kind, usage.c.minute >= begin, usage.c.minute < end]
    where += [usage.c[name].in_(list(values)) for name, values in (wanted or {}).items()]
    sums = [func.sum(usage.c[name]).label(name) for name in Count.__dataclass_fields__]
    statement = select(bucket, *groups, *sums).where(*where).group_by(bucket, *groups).order_by(bucket, *groups)
    return list(connection.execute(statement).mappings())
