"""`/v1/fine_tuning/checkpoints/{model}/permissions`: create, list, delete. What is granted is seen at once."""

from __future__ import annotations

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import ModelNotFound, NotFound
from gateway.routes.body import read_json
from gateway.store import models as model_statements
from gateway.store import permissions as statements
from gateway.store.models import ModelRow
from gateway.store.pages import Page
from gateway.store.permissions import Permission
from gateway.wire import permissions as wire
from gateway.wire.page import list_body, parse_page


async def create_permissions(request: Request) -> Response:
    """Lets other projects see a tuned model; granting again changes nothing. The answer is a list, as OpenAI's."""
    state, name = request.app.state, request.path_params["model"]
    asked = wire.parse_create(await read_json(request, state.settings.limits.body_bytes))

    def grant(connection: Connection) -> tuple[ModelRow, list[Permission], set[str]]:
        row = _find(connection, name)
        return row, statements.grant(connection, name, asked), statements.projects_of(connection, name)

    row, granted, projects = await state.store.write(grant)
    state.catalog.show(name, frozenset({row.project_id, *projects}))
    return JSONResponse(list_body([wire.permission_object(permission) for permission in granted], has_more=False))


async def list_permissions(request: Request) -> Response:
    name, params = request.path_params["model"], request.query_params
    order = wire.parse_order(params.get("order"))
    query = parse_page({name: params[name] for name in ("limit", "after") if name in params}, default_limit=10)

    def read(connection: Connection) -> Page[Permission]:
        _find(connection, name)
        project_id = params.get("project_id") or None
        return statements.select_permissions(
            connection, name, project_id=project_id, limit=query.limit, after=query.after, order=order
        )

    page = await request.app.state.store.read(read)
    return JSONResponse(list_body([wire.permission_object(found) for found in page.items], page.has_more))


async def delete_permission(request: Request) -> Response:
    """Deleting again changes nothing."""
    state, name = request.app.state, request.path_params["model"]
    permission_id = request.path_params["permission_id"]

    def withdraw(connection: Connection) -> tuple[ModelRow, set[str]]:
        row = _find(connection, name)
        if not statements.withdraw(connection, name, permission_id):
            raise NotFound(f"No such permission of '{name[:200]}': {permission_id[:100]}", param="permission_id")
        return row, statements.projects_of(connection, name)

    row, projects = await state.store.write(withdraw)
    state.catalog.show(name, frozenset({row.project_id, *projects}))
    return JSONResponse(wire.deleted_object(permission_id))


routes = [
    Route("/v1/fine_tuning/checkpoints/{model:path}/permissions", create_permissions, methods=["POST"]),
    Route("/v1/fine_tuning/checkpoints/{model:path}/permissions", list_permissions, methods=["GET"]),
    Route(
        "/v1/fine_tuning/checkpoints/{model:path}/permissions/{permission_id}", delete_permission, methods=["DELETE"]
    ),
]


def _find(connection: Connection, name: str) -> ModelRow:
    row = model_statements.select_named(connection, name)
    if row is None:
        raise ModelNotFound(name)
    return row
