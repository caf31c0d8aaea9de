"""`/v1/batches`: create, list, retrieve, cancel. What runs them is `gateway.batches`."""

from __future__ import annotations

import time

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import NotFound, RequestError
from gateway.jobs.creation import too_many_jobs
from gateway.routes import caller_of, project_of
from gateway.routes.body import read_json
from gateway.routes.idempotency import idempotency_key
from gateway.store import batches as statements
from gateway.store import files as file_statements
from gateway.store import idempotency
from gateway.store import jobs as job_statements
from gateway.store.batches import Batch
from gateway.store.ids import new_id
from gateway.wire import batches as wire
from gateway.wire.page import list_body, parse_page

PURPOSE = "batch"


async def create_batch(request: Request) -> Response:
    """A batch that is answered is committed, and is run whatever happens to this process."""
    state, caller = request.app.state, caller_of(request.scope)
    key = idempotency_key(request)
    asked = wire.parse_create(await read_json(request, state.settings.limits.body_bytes))
    mark = idempotency.fingerprint("batch", asked)
    served = {getattr(route, "path", "") for route in request.app.routes}
    if asked.endpoint not in served:
        raise RequestError(f"'{asked.endpoint}' is not served here, in a batch or otherwise", param="endpoint")

    def insert(connection: Connection) -> Batch:
        earlier = idempotency.recall(connection, caller.project_id, key, mark)
        if earlier is not None:
            return _find(connection, earlier, caller.project_id)
        now = int(time.time())
        file = file_statements.select_file(connection, asked.input_file_id, now=now, project_id=caller.project_id)
        if file is None:
            raise RequestError(
                f"{asked.input_file_id[:100]} does not exist. Upload it first, with the purpose '{PURPOSE}'.",
                param="input_file_id",
            )
        if file.purpose != PURPOSE:
            raise RequestError(
                f"{file.id} was uploaded with the purpose '{file.purpose}'; a batch needs the purpose '{PURPOSE}'.",
                param="input_file_id",
            )
        if caller.limits.jobs is not None:
            active = statements.count_active(connection, caller.project_id)
            active += job_statements.count_active(connection, caller.project_id)
            if active >= caller.limits.jobs:
                raise too_many_jobs(active, caller.limits.jobs)
        batch = Batch(
            new_id("batch_"),
            now,
            **vars(asked),
            input_digest=file.digest,
            expires_at=now + wire.WINDOWS_S[asked.completion_window],
            key_id=caller.key_id,
            project_id=caller.project_id,
        )
        statements.insert_batch(connection, batch)
        idempotency.remember(connection, caller.project_id, key, mark, batch.id)
        return batch

    batch = await state.store.write(insert)
    state.batches.wake()
    return JSONResponse(wire.batch_object(batch))


async def list_batches(request: Request) -> Response:
    """Newest first."""
    query, project_id = parse_page(request.query_params), project_of(request)
    page = await request.app.state.store.read(
        lambda connection: statements.select_batches(connection, project_id, limit=query.limit, after=query.after)
    )
    return JSONResponse(list_body([wire.batch_object(batch) for batch in page.items], page.has_more))


async def retrieve_batch(request: Request) -> Response:
    batch_id, project_id = request.path_params["batch_id"], project_of(request)
    batch = await request.app.state.store.read(lambda connection: _find(connection, batch_id, project_id))
    return JSONResponse(wire.batch_object(batch))


async def cancel_batch(request: Request) -> Response:
    """What is done is kept; cancelling again changes nothing. A batch that is over cannot be cancelled: 400, never 409."""
    state = request.app.state
    batch_id, project_id = request.path_params["batch_id"], project_of(request)

    def cancel(connection: Connection) -> Batch:
        _find(connection, batch_id, project_id)
        now = int(time.time())
        statements.move_batch(connection, batch_id, ("validating", "in_progress"), "cancelling", now)
        return _find(connection, batch_id, project_id)

    batch = await state.store.write(cancel)
    if batch.status not in ("cancelling", "cancelled"):
        raise RequestError(
            f"Batch {batch.id} is {batch.status} and cannot be cancelled any more.", code="invalid_batch_status"
        )
    state.batches.wake()
    return JSONResponse(wire.batch_object(batch))


routes = [
    Route("/v1/batches", create_batch, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{batch_id}", retrieve_batch, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", cancel_batch, methods=["POST"]),
]


def _find(connection: Connection, batch_id: str, project_id: str) -> Batch:
    batch = statements.select_batch(connection, batch_id, project_id)
    if batch is None:
        raise NotFound(f"No batch found with id '{batch_id[:100]}'.", param="batch_id")
    return batch
