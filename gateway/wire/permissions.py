"""Permissions on the wire: which projects are to see a tuned model, beside its own. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gateway.errors import RequestError
from gateway.wire.fields import Body, refuse_unknown, show
from gateway.wire.page import Order

if TYPE_CHECKING:
    from gateway.store.permissions import Permission

MAX_PROJECTS = 100
ORDERS: dict[str, Order] = {"ascending": "asc", "descending": "desc"}
_PROJECT = re.compile(r"[\w .@/+-]{1,64}")


def parse_create(body: Body) -> list[str]:
    """The projects. Raises RequestError."""
    refuse_unknown(body, ("project_ids",))
    asked = body.get("project_ids")
    if not isinstance(asked, list) or not 1 <= len(asked) <= MAX_PROJECTS:
        raise RequestError(
            f"'project_ids' must be a list of 1 to {MAX_PROJECTS} projects, not {show(asked)}", param="project_ids"
        )
    for project in asked:
        if not isinstance(project, str) or not _PROJECT.fullmatch(project):
            raise RequestError(f"'project_ids' holds {show(project)}, which is no project's name", param="project_ids")
    return asked


def parse_order(text: str | None) -> Order:
    """`order`, which is ascending or descending here. Raises RequestError."""
    if not text:
        return "desc"
    if text not in ORDERS:
        raise RequestError(
            f"Invalid value for 'order': {text[:40]!r}. It is 'ascending' or 'descending'.", param="order"
        )
    return ORDERS[text]


def permission_object(permission: Permission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project_id,
    }


def deleted_object(permission_id: str) -> dict[str, Any]:
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}
