"""Every statement on published models. A deleted one keeps its row, so that its name is never given away again."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import Connection, RowMapping, insert, select, update

from gateway.store.tables import DEFAULT_PROJECT, models


@dataclass(frozen=True)
class ModelRow:
    """A tuned model: an adapter in `adapter_path` that engines of `base` know as `engine_name`, for ever."""

    name: str
    created_at: int
    base: str
    adapter_digest: str  # of its manifest, "sha256:…"
    adapter_path: str
    engine_name: str
    template_digest: str
    job_id: str | None
    owned_by: str
    step_number: int | None = None  # of the checkpoint; None for a job's final model
    project_id: str = DEFAULT_PROJECT


def insert_model(connection: Connection, model: ModelRow) -> None:
    connection.execute(insert(models).values(**vars(model)))


def replace_model(connection: Connection, model: ModelRow) -> None:
    """Publishes a version of a name that may have one already: that one is hidden, under the name that engines know it by."""
    where = (models.c.project_id == model.project_id, models.c.name == model.name)
    old = connection.execute(select(models.c.seq, models.c.engine_name).where(*where)).one_or_none()
    if old is not None:
        hidden = {"name": f"{old.engine_name}#{old.seq}", "deleted_at": int(time.time())}
        connection.execute(update(models).where(models.c.seq == old.seq).values(**hidden))
    insert_model(connection, model)


def select_model(connection: Connection, name: str, project_id: str = DEFAULT_PROJECT) -> ModelRow | None:
    where = (models.c.project_id == project_id, models.c.name == name, models.c.deleted_at.is_(None))
    row = connection.execute(select(models).where(*where)).mappings().one_or_none()
    return None if row is None else _model(row)


def select_named(connection: Connection, name: str) -> ModelRow | None:
    """The model of that name, whichever project it belongs to."""
    where = (models.c.name == name, models.c.deleted_at.is_(None))
    row = connection.execute(select(models).where(*where)).mappings().first()
    return None if row is None else _model(row)


def list_all(connection: Connection) -> list[ModelRow]:
    """Every model that is not deleted, oldest first."""
    rows = connection.execute(select(models).where(models.c.deleted_at.is_(None)).order_by(models.c.seq)).mappings()
    return [_model(row) for row in rows]


def of_base(connection: Connection, base: str) -> list[ModelRow]:
    """The models of one base that are not deleted, oldest first."""
    where = (models.c.base == base, models.c.deleted_at.is_(None))
    return [_model(row) for row in connection.execute(select(models).where(*where).order_by(models.c.seq)).mappings()]


def checkpoints_of(connection: Connection, job_id: str) -> list[ModelRow]:
    """The checkpoints of a job that are models, by step."""
    where = (models.c.job_id == job_id, models.c.step_number.is_not(None), models.c.deleted_at.is_(None))
    statement = select(models).where(*where).order_by(models.c.step_number)
    return [_model(row) for row in connection.execute(statement).mappings()]


def was_named(connection: Connection, project_id: str, name: str) -> bool:
    """Whether there is a model of that name, or was one."""
    where = (models.c.project_id == project_id, models.c.name == name)
    return connection.scalar(select(models.c.seq).where(*where)) is not None


def delete(connection: Connection, project_id: str, name: str) -> bool:
    """Hides the model for good; False when there was none to see."""
    where = (models.c.project_id == project_id, models.c.name == name, models.c.deleted_at.is_(None))
    return connection.execute(update(models).where(*where).values(deleted_at=int(time.time()))).rowcount == 1


def was_deleted(connection: Connection, project_id: str, name: str) -> bool:
    """Whether the project had a model of that name and deleted it."""
    where = (models.c.project_id == project_id, models.c.name == name, models.c.deleted_at.is_not(None))
    return connection.scalar(select(models.c.seq).where(*where)) is not None


def select_digests(connection: Connection) -> tuple[set[str], set[str]]:
    """The digests of all adapters that there ever was a model of, and of those that there is one of now."""
    rows = connection.execute(select(models.c.adapter_digest, models.c.deleted_at)).all()
    return {row.adapter_digest for row in rows}, {row.adapter_digest for row in rows if row.deleted_at is None}


def _model(row: RowMapping) -> ModelRow:
    return ModelRow(**{name: row[name] for name in ModelRow.__dataclass_fields__})
