"""`/v1/chat/completions` that were stored: list, retrieve, update, delete, and the messages that they answer."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import NotFound
from gateway.routes import project_of
from gateway.routes.body import read_json
from gateway.store import completions as statements
from gateway.store.completions import Completion
from gateway.store.database import Store
from gateway.wire import stored_completions as wire
from gateway.wire.metadata import parse_metadata_filter
from gateway.wire.page import list_body, parse_page, slice_page


async def keep_completion(store: Store, kept: dict[str, Any], project_id: str, body: dict[str, Any]) -> None:
    """Stores a completion with what was kept of its request."""
    completion = Completion(
        id=body["id"],
        project_id=project_id,
        created_at=body["created"],
        model=body["model"],
        metadata=kept["metadata"],
        messages=kept["messages"],
        body=kept["shown"] | body,
    )
    await store.write(lambda connection: statements.insert_completion(connection, completion))


async def list_completions(request: Request) -> Response:
    """Oldest first, unless `order` is "desc"."""
    query = parse_page(request.query_params, default_order="asc")
    metadata = parse_metadata_filter(request.query_params, "completions")
    project_id, model = project_of(request), request.query_params.get("model") or None
    page = await request.app.state.store.read(
        lambda connection: statements.select_completions(
            connection,
            project_id,
            limit=query.limit,
            after=query.after,
            order=query.order,
            model=model,
            metadata=metadata,
        )
    )
    return JSONResponse(list_body([wire.completion_object(item) for item in page.items], page.has_more))


async def retrieve_completion(request: Request) -> Response:
    return JSONResponse(wire.completion_object(await _find(request)))


async def update_completion(request: Request) -> Response:
    state, completion_id, project_id = request.app.state, request.path_params["completion_id"], project_of(request)
    metadata = wire.parse_update(await read_json(request, state.settings.limits.body_bytes))
    completion = await state.store.write(
        lambda connection: statements.update_metadata(connection, completion_id, project_id, metadata)
    )
    if completion is None:
        raise _unknown(completion_id)
    return JSONResponse(wire.completion_object(completion))


async def delete_completion(request: Request) -> Response:
    completion_id, project_id = request.path_params["completion_id"], project_of(request)
    now = int(time.time())
    if not await request.app.state.store.write(
        lambda connection: statements.delete_completion(connection, completion_id, project_id, now=now)
    ):
        raise _unknown(completion_id)
    return JSONResponse(wire.deleted_object(completion_id))


async def list_messages(request: Request) -> Response:
    """In the order in which they were sent, unless `order` is "desc"."""
    query = parse_page(request.query_params, default_order="asc")
    messages = wire.message_objects(await _find(request))
    return JSONResponse(list_body(*slice_page(messages, query)))


async def _find(request: Request) -> Completion:
    completion_id, project_id = request.path_params["completion_id"], project_of(request)
    found: Completion | None = await request.app.state.store.read(
        lambda connection: statements.select_completion(connection, completion_id, project_id)
    )
    if found is None:
        raise _unknown(completion_id)
    return found


def _unknown(completion_id: str) -> NotFound:
    return NotFound(f"No stored chat completion found with id: {completion_id[:100]}", param="id")


routes = [
    Route("/v1/chat/completions", list_completions, methods=["GET"]),
    Route("/v1/chat/completions/{completion_id}", retrieve_completion, methods=["GET"]),
    Route("/v1/chat/completions/{completion_id}", update_completion, methods=["POST"]),
    Route("/v1/chat/completions/{completion_id}", delete_completion, methods=["DELETE"]),
    Route("/v1/chat/completions/{completion_id}/messages", list_messages, methods=["GET"]),
]
