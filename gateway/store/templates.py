"""Every statement on templates that were registered through the API. A name has one row: its newest version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from gateway.store.tables import DEFAULT_PROJECT, templates


@dataclass(frozen=True)
class TemplateRow:
    """A registered template; `kind` and `source` are what `gateway.chat` makes it of."""

    name: str
    created_at: int
    kind: str
    source: dict[str, Any]
    project_id: str = DEFAULT_PROJECT


def put_template(connection: Connection, template: TemplateRow) -> None:
    """Stores the template in the place of an earlier one of that name."""
    remove_template(connection, template.name, template.project_id)
    connection.execute(insert(templates).values(**vars(template)))


def remove_template(connection: Connection, name: str, project_id: str = DEFAULT_PROJECT) -> bool:
    """Whether there was one to remove."""
    where = (templates.c.project_id == project_id, templates.c.name == name)
    return connection.execute(delete(templates).where(*where)).rowcount == 1


def list_templates(connection: Connection, project_id: str = DEFAULT_PROJECT) -> list[TemplateRow]:
    """Oldest first."""
    where = templates.c.project_id == project_id
    rows = connection.execute(select(templates).where(where).order_by(templates.c.seq)).mappings()
    return [TemplateRow(**{name: row[name] for name in TemplateRow.__dataclass_fields__}) for row in rows]
