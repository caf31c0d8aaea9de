"""Builds every object once, and holds the route table. Read this second, after `DESIGN`'s picture in the README.

The lifespan opens the data folder and the store before the first request; bases are prepared and their engines started beside
the running server, which says on `/readyz` when they answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import MethodNotAllowed, NotFound, RequestError, TunegateError
from gateway.front import Front
from gateway.hangup import hangups
from gateway.house import House
from gateway.logs import RequestLog
from gateway.routes import (
    batches,
    chat,
    completions,
    embeddings,
    evals,
    exports,
    files,
    fine_tuning,
    graders,
    health,
    models,
    moderations,
    openapi,
    permissions,
    preview,
    responses,
    stored_completions,
    templates,
    uploads,
    usage,
)
from gateway.routes.body import ClientLeft
from gateway.routes.reply import error_response
from gateway.settings import Settings, is_loopback
from gateway.store.datadir import DataDir
from gateway.tracing import open_tracer

logger = logging.getLogger("tunegate")

ROUTES = [
    *chat.routes,
    *stored_completions.routes,
    *responses.routes,
    *completions.routes,
    *embeddings.routes,
    *exports.routes,
    *models.routes,
    *files.routes,
    *fine_tuning.routes,
    *graders.routes,
    *evals.routes,
    *moderations.routes,
    *permissions.routes,
    *preview.routes,
    *templates.routes,
    *uploads.routes,
    *batches.routes,
    *usage.routes,
    *openapi.routes,
    *health.routes,
]


def create_app(settings: Settings, data_dir: DataDir, read_settings: Callable[[], Settings] | None = None) -> Starlette:
    """The ASGI application on a data folder that this process holds; nothing starts before its lifespan begins.

    With `read_settings`, SIGHUP has them read again.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with House(settings, data_dir, read_settings) as house, hangups(house.reload):
            app.state.settings = settings
            app.state.data_dir, app.state.store, app.state.blobs = house.data_dir, house.store, house.blobs
            app.state.catalog, app.state.inference = house.catalog, house.inference
            app.state.starting = house.starting
            app.state.request_metrics, app.state.tracer = house.request_metrics, tracer
            app.state.keyring, app.state.batches, app.state.exports = house.keyring, house.batches, house.exports
            house.batches.start(app)
            app.state.supervisor = house.supervisor
            app.state.responses, app.state.graders, app.state.evals = house.responses, house.graders, house.evals
            app.state.templates, app.state.previews = house.templates, house.previews
            yield
        log.flush()
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    tracer = None if settings.otlp_endpoint is None else open_tracer(settings.otlp_endpoint)
    log = RequestLog(settings.log_format, enabled=settings.log_level in ("debug", "info"))
    hosts = frozenset(name.encode().lower() for name in settings.hosts)
    front = Middleware(Front, hosts=hosts, local=is_loopback(settings.host), log=log)
    return Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[front],
        exception_handlers={TunegateError: _tell, HTTPException: _tell_router, ClientLeft: _say_nothing},  # type: ignore[dict-item]
    )


async def _tell(_: Request, error: TunegateError) -> Response:
    if error.status >= 500:
        logger.warning("%s: %s", type(error).__name__, error.message)
    return error_response(error)


async def _tell_router(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return error_response(
            NotFound(f"Unknown request URL: {where}. The README lists what is served.", code="unknown_url")
        )
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"Not allowed: {where}. Try {(error.headers or {}).get('Allow')}."))
        response.headers.update(error.headers or {})
        return response
    told = RequestError(error.detail)
    told.status = error.status_code
    return error_response(told)


async def _say_nothing(_: Request, __: ClientLeft) -> Response:
    return Response(status_code=400)
