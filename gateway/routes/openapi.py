"""`/v1/openapi.json`: what is served, as an OpenAPI document."""

from __future__ import annotations

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway import __version__
from gateway.openapi.document import make_document


async def show_document(request: Request) -> Response:
    """This very document."""
    return Response(orjson.dumps(make_document(request.app.routes, __version__)), media_type="application/json")


routes = [Route("/v1/openapi.json", show_document, methods=["GET"])]
