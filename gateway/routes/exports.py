"""`POST /v1/models/{model}/export`, an extension of ours: a tuned model becomes a file to download."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import Forbidden, ModelNotFound
from gateway.export_plan import ExportPlan, refuse_base
from gateway.routes import caller_of
from gateway.routes.body import read_json
from gateway.routes.idempotency import idempotency_key
from gateway.store import models as statements
from gateway.wire import exports as wire
from gateway.wire.files import file_object


async def export_model(request: Request) -> Response:
    """Begins an export and answers with the file that it will be: "uploaded" until it is "processed", or "error"."""
    state, caller, name = request.app.state, caller_of(request.scope), request.path_params["model"]
    asked = wire.parse_export(await read_json(request, state.settings.limits.body_bytes))
    served = state.catalog.model(name, caller.project_id)
    if not state.catalog.is_tuned(name):
        raise refuse_base(name)
    row = await state.store.read(lambda connection: statements.select_named(connection, name))
    if row is None:  # deleted just now
        raise ModelNotFound(name)
    if row.project_id != caller.project_id:
        raise Forbidden(f"'{name}' belongs to another project, which alone exports it", param="model")
    base = state.catalog.base(served.base).prepared
    plan = ExportPlan(name, base.path, Path(row.adapter_path), asked.to, asked.type)
    key = idempotency_key(request)
    return JSONResponse(file_object(await state.exports.begin(caller, plan, asked.expires_after_s, key)))


routes = [Route("/v1/models/{model:path}/export", export_model, methods=["POST"])]
