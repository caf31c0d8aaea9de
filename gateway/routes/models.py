"""`/v1/models`: list, retrieve, and delete of tuned ones."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import Forbidden
from gateway.routes import project_of
from gateway.store import models as statements
from gateway.wire.models import deleted_body, model_body


async def list_models(request: Request) -> Response:
    catalog = request.app.state.catalog
    listed = [*catalog.models(project_of(request)), *catalog.upstreams]
    data = [model_body(model.name, model.created_at, model.owned_by) for model in listed]
    return JSONResponse({"object": "list", "data": data})


async def retrieve_model(request: Request) -> Response:
    catalog, name = request.app.state.catalog, request.path_params["model"]
    served = catalog.upstream(name) or catalog.model(name, project_of(request))
    return JSONResponse(model_body(served.name, served.created_at, served.owned_by))


async def delete_model(request: Request) -> Response:
    """Gone at once for new requests; replies that run are finished. Deleting twice is fine."""
    state, name = request.app.state, request.path_params["model"]
    project = project_of(request)
    if await state.store.read(lambda connection: statements.was_deleted(connection, project, name)):
        return JSONResponse(deleted_body(name))
    if not state.catalog.is_tuned(name):
        if state.catalog.upstream(name) is None:
            state.catalog.model(name, project)  # raises ModelNotFound
        raise Forbidden(
            f"'{name}' is not a tuned model; bases, aliases and upstreams are removed in the settings file",
            param="model",
        )
    served = state.catalog.model(name, project)
    if not await state.store.write(lambda connection: statements.delete(connection, project, name)):
        raise Forbidden(f"'{name}' belongs to another project, which alone deletes it", param="model")
    state.catalog.withdraw(name)
    await state.catalog.base(served.base).engine.drop_adapter(served.engine_model)
    return JSONResponse(deleted_body(name))


routes = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{model:path}", retrieve_model, methods=["GET"]),
    Route("/v1/models/{model:path}", delete_model, methods=["DELETE"]),
]
