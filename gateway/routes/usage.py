"""`/v1/organization/usage/…`: what was used, in buckets of time, over all projects."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.store.metering import Kind, sum_counts
from gateway.wire import usage as wire


async def completions(request: Request) -> Response:
    """Chat, completions and whatever else generates."""
    return await _answer(request, "completions")


async def embeddings(request: Request) -> Response:
    return await _answer(request, "embeddings")


async def _answer(request: Request, kind: Kind) -> Response:
    query = wire.parse_usage(request.query_params.multi_items(), int(time.time()))
    end = min(query.end, query.begin + query.limit * query.width_s)
    rows = await request.app.state.store.read(
        lambda connection: sum_counts(
            connection,
            kind,
            query.begin,
            end,
            width_s=query.width_s,
            group_by=query.group_by,
            wanted=query.wanted,
        )
    )
    return JSONResponse(wire.usage_page(query, kind, rows))


routes = [
    Route("/v1/organization/usage/completions", completions, methods=["GET"]),
    Route("/v1/organization/usage/embeddings", embeddings, methods=["GET"]),
]
