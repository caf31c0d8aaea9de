"""`/v1/templates`: list, retrieve, register, delete; and which one a model is rendered through, at FastChat's addresses.

A template is registered here or in the settings, never sent along with a request for a reply.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.errors import RequestError
from gateway.routes import project_of
from gateway.routes.body import parse_json, read_body, read_json
from gateway.templates import Entry, Templates, source_version
from gateway.wire import templates as wire


async def list_templates(request: Request) -> Response:
    templates: Templates = request.app.state.templates
    data = [_shown(templates, entry) for entry in templates.entries()]
    return JSONResponse({"object": "list", "data": data})


async def retrieve_template(request: Request) -> Response:
    templates: Templates = request.app.state.templates
    return JSONResponse(_shown(templates, templates.entry(request.path_params["name"]), whole=True))


async def register_template(request: Request) -> Response:
    """What is answered is stored, and bases that name it are rendered through it from then on."""
    state = request.app.state
    asked = wire.parse_registration(await read_json(request, state.settings.limits.body_bytes))
    entry = await state.templates.register(asked)
    return JSONResponse(_shown(state.templates, entry, whole=True))


async def delete_template(request: Request) -> Response:
    name = request.path_params["name"]
    await request.app.state.templates.remove(name)
    return JSONResponse(wire.deleted_body(name))


async def show_conversation_template(request: Request) -> Response:
    """The template in use for a model: for ?model=NAME, or for FastChat's body {"model": NAME}, or for the only base."""
    state = request.app.state
    name = request.query_params.get("model")
    if name is None and request.method == "POST":
        body = await read_body(request.receive, state.settings.limits.body_bytes)
        name = parse_json(body).get("model") if body else None
    if name is not None and not isinstance(name, str):
        raise RequestError("'model' must be a string, the name of a model", param="model")
    if name is None:
        bases = [base.name for base in state.catalog.bases]
        if len(bases) != 1:
            raise RequestError(
                f"say which model: ?model=NAME; the bases are {', '.join(bases) or 'not ready'}", param="model"
            )
        name = bases[0]
    bundle = state.catalog.model(name, project_of(request)).bundle
    template, source = bundle.template, bundle.template.source()
    version = source_version(template.kind, source)
    return JSONResponse(
        wire.conversation_body(name, template.name, template.kind, version, source, bundle=bundle.digest)
    )


def _shown(templates: Templates, entry: Entry, *, whole: bool = False) -> dict[str, object]:
    return wire.template_object(
        name=entry.name,
        kind=entry.kind,
        origin=entry.origin,
        version=entry.version,
        created_at=entry.created_at,
        overrides=entry.overrides,
        bases=templates.rendered_through(entry),
        source=entry.source if whole else None,
    )


routes = [
    Route("/v1/templates", list_templates, methods=["GET"]),
    Route("/v1/templates", register_template, methods=["POST"]),
    Route("/v1/templates/{name:path}", retrieve_template, methods=["GET"]),
    Route("/v1/templates/{name:path}", delete_template, methods=["DELETE"]),
    Route("/worker_get_conversation_template", show_conversation_template, methods=["GET", "POST"]),
    Route("/worker_get_conv_template", show_conversation_template, methods=["GET", "POST"]),
]
