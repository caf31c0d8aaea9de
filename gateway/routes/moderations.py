"""`/v1/moderations`: no model here classifies texts, and an invented score would be worse than none.

The answer is a 404 and no 501: clients would send what is a 5xx again and again.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import NotFound


async def create_moderation(_: Request) -> Response:
    raise NotFound(
        "No moderation model is configured on this server, so nothing was classified. Point the moderation calls of your "
        "program at a service that has one.",
        code="moderation_not_configured",
    )


routes = [Route("/v1/moderations", create_moderation, methods=["POST"])]
