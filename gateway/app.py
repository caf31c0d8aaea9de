"""Builds every object once, and holds the route table. Read this second, after `DESIGN`'s picture in the README.

The lifespan opens the data folder and the store before the first request; bases are prepared and their engines started beside
the running server, which says on `/readyz` when they answer.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import BodyTooLarge, Forbidden, MethodNotAllowed, Misdirected, NotFound, RequestError, TunegateError
from gateway.hangup import hangups
from gateway.house import House
from gateway.routes import chat, completions, embeddings, files, fine_tuning, health, models, preview, templates
from gateway.routes.body import ClientLeft
from gateway.settings import Settings
from gateway.store.datadir import DataDir

logger = logging.getLogger("tunegate")

ROUTES = [
    *chat.routes,
    *completions.routes,
    *embeddings.routes,
    *models.routes,
    *files.routes,
    *fine_tuning.routes,
    *preview.routes,
    *templates.routes,
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
            app.state.supervisor = house.supervisor
            app.state.templates, app.state.previews = house.templates, house.previews
            yield

    return Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(Front)],
        exception_handlers={TunegateError: _tell, HTTPException: _tell_router, ClientLeft: _say_nothing, 500: _crash},  # type: ignore[dict-item]
    )


class Front:
    """The first thing a request meets: Host and Origin are checked, and every response gets an id and its time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                elapsed_ms = int((time.perf_counter() - began) * 1000)
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", b"req_" + secrets.token_hex(16).encode()),
                    (b"openai-processing-ms", b"%d" % elapsed_ms),
                    (b"openai-version", b"2020-10-01"),
                ]
            await send(message)

        refusal = _foreign(scope)
        if refusal is not None:
            await _response(refusal)(scope, receive, send_named)
        else:
            await self._app(scope, receive, send_named)


def _foreign(scope: Scope) -> TunegateError | None:
    """A page in a browser must not reach a server on its visitor's own machine, under whatever name it found it."""
    host = origin = b""
    for name, value in scope["headers"]:
        if name == b"host":
            host = value
        elif name == b"origin":
            origin = value
    if not _is_local(host):
        return Misdirected(
            f"the Host header is {host[:100].decode('latin-1')!r}; this server answers as localhost or 127.0.0.1 only"
        )
    if origin and not _is_local(origin.partition(b"://")[2]):
        return Forbidden(f"requests from the origin {origin[:100].decode('latin-1')!r} are refused")
    return None


def _is_local(authority: bytes) -> bool:
    name = authority.rpartition(b":")[0] if authority[-1:].isdigit() and b":" in authority else authority
    return name in (b"localhost", b"[::1]") or (
        name.startswith(b"127.") and name.count(b".") == 3 and name.replace(b".", b"").isdigit()
    )


def _response(error: TunegateError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, BodyTooLarge):
        headers["Connection"] = "close"  # else the rest of the body would be read and thrown away, however long it is
    return Response(orjson.dumps(error.body()), error.status, headers, "application/json")


async def _tell(_: Request, error: TunegateError) -> Response:
    if error.status >= 500:
        logger.warning("%s: %s", type(error).__name__, error.message)
    return _response(error)


async def _tell_router(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router, in OpenAI's shape."""
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return _response(
            NotFound(f"Unknown request URL: {where}. The README lists what is served.", code="unknown_url")
        )
    if error.status_code == 405:
        response = _response(MethodNotAllowed(f"Not allowed: {where}. Try {(error.headers or {}).get('Allow')}."))
        response.headers.update(error.headers or {})
        return response
    told = RequestError(error.detail)
    told.status = error.status_code
    return _response(told)


async def _say_nothing(_: Request, __: ClientLeft) -> Response:
    return Response(status_code=400)


async def _crash(request: Request, error: Exception) -> Response:
    logger.error("unexpected, at %s %s", request.method, request.url.path, exc_info=error)
    return _response(TunegateError("The server had an error while processing your request; its log says more."))
