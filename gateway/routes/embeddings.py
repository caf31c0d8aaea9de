"""`POST /v1/embeddings`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.inference import Inference
from gateway.routes import caller_of
from gateway.routes.body import read_asked
from gateway.wire import embeddings as wire


async def create_embeddings(request: Request) -> Response:
    """Parse → embed → respond."""
    state = request.app.state
    inference: Inference = state.inference
    asked = wire.parse(await read_asked(request.receive, state.settings, "embeddings"))
    made = await inference.embed(asked.model, asked.inputs, caller=caller_of(request.scope))
    body = await asyncio.to_thread(wire.embeddings, asked, made.vectors, made.prompt_tokens)
    return Response(body, media_type="application/json")


routes = [Route("/v1/embeddings", create_embeddings, methods=["POST"])]
