"""The first thing a request meets: where it comes from, whose it is and what it may; and what every response carries.

Its one rule: what is not known to be allowed is refused. A path without an entry in RESOURCES needs the scope `admin`, and all
but the two probes need a key once there are keys. Plain ASGI, and without an await where nothing has changed: every
request passes here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import access
from gateway.access import ANYBODY, Caller
from gateway.errors import Forbidden, Misdirected, TunegateError, Unauthorized, UnsupportedMediaType
from gateway.keys import Keyring
from gateway.logs import RequestLog
from gateway.routes import CALLER, REQUEST_ID, caller_of
from gateway.routes.reply import error_response

logger = logging.getLogger("tunegate")

# The scope that a key needs, by the first part of the path behind /v1/.
RESOURCES: dict[str, access.Scope] = {
    "chat": "infer",
    "completions": "infer",
    "embeddings": "infer",
    "responses": "infer",
    "moderations": "infer",
    "models": "infer",  # to delete or export one: tune
    "batches": "infer",
    "files": "files",
    "uploads": "files",
    "fine_tuning": "tune",
    "evals": "tune",
    "openapi.json": "infer",
    "templates": "infer",  # to read them; to change them: admin
}
PROBES = ("/healthz", "/readyz")  # what asks for them has no key, and is told no more than a status
TEMPLATE_PROBES = ("/worker_get_conversation_template", "/worker_get_conv_template")


class Front:
    """Host and Origin, the key and its scope, its allowance; then the request id, the time it took and one line in the log."""

    def __init__(self, app: ASGIApp, *, hosts: frozenset[bytes], local: bool, log: RequestLog) -> None:
        """`local`: the server listens on loopback alone. `hosts`: further names that it is reached under."""
        self._app = app
        self._hosts = hosts
        self._local = local
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = b"req_" + secrets.token_hex(16).encode()
        caller: Caller | None = None
        status = 0
        events = False

        async def send_named(message: Message) -> None:
            nonlocal status, events
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id),
                    (b"openai-processing-ms", b"%d" % int((time.perf_counter() - began) * 1000)),
                    (b"openai-version", b"2020-10-01"),
                ]
                if caller is not None and caller.allowance is not None:
                    headers += caller.allowance.headers()
                message["headers"] = headers
                events = headers[0][1].startswith(b"text/event-stream")
            await send(message)

        scope[REQUEST_ID] = request_id
        state = scope["app"].state
        method, resource = scope["method"], resource_of(scope["path"])
        span = None if state.tracer is None else state.tracer.begin(method, resource, scope["headers"])
        try:
            if CALLER in scope:  # a line of a batch, put here by this process: no connection can write into a scope
                caller = caller_of(scope)
            else:
                caller = await self._admit(scope)
                scope[CALLER] = caller
                if caller.allowance is not None:
                    caller.allowance.take_request()
            if caller.key_id is None:
                await self._app(scope, receive, send_named)
            elif not await self._run_revocable(caller.key_id, scope, receive, send_named):
                await _end_revoked(status, events, scope, receive, send_named)
        except TunegateError as error:
            if status:
                raise
            await error_response(error)(scope, receive, send_named)
        except Exception as error:  # the boundary: a fault of ours ends one request
            logger.error("unexpected, at %s %s", method, scope["path"], exc_info=error)
            if status:
                raise  # too late for an error object: the connection is cut
            crash = TunegateError("The server had an error while processing your request; its log says more.")
            await error_response(crash)(scope, receive, send_named)
        finally:
            took_s = time.perf_counter() - began
            key_id = None if caller is None else caller.key_id
            self._log.add(request_id, method, scope["raw_path"], status, took_s, key_id)
            state.request_metrics.observe(resource, method, status, took_s)
            if span is not None:
                state.tracer.end(span, method, status, request_id, key_id, caller and caller.project_id)

    async def _run_revocable(self, key_id: str, scope: Scope, receive: Receive, send: Send) -> bool:
        """Runs the request; False when its key was revoked before its end."""
        keyring: Keyring = scope["app"].state.keyring
        task = asyncio.current_task()
        assert task is not None
        keyring.begins(key_id, task)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if keyring.ends(key_id, task):
                raise
            task.uncancel()
            return False
        finally:
            keyring.ends(key_id, task)
        return True

    async def _admit(self, scope: Scope) -> Caller:
        """Who asks. Raises Misdirected, Unauthorized, Forbidden."""
        host = origin = authorization = b""
        n_hosts = 0
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
                n_hosts += 1
            elif name == b"origin":
                origin = value
            elif name == b"authorization":
                authorization = value
            elif name == b"content-encoding" and value.strip().lower() not in (b"identity", b""):
                raise UnsupportedMediaType("A compressed body (Content-Encoding) is not taken: send it as it is.")
        self._check_origin(host, origin, n_hosts)
        path: str = scope["path"]
        if path in PROBES:
            return ANYBODY
        keyring: Keyring = scope["app"].state.keyring
        if keyring.is_stale():
            await keyring.reload()
        caller = keyring.find(authorization)
        if caller.key_id is not None:
            needed = scope_of(scope["method"], path)
            if not caller.may(needed):
                raise Forbidden(
                    f"This key has the scope{'s' * (len(caller.scopes) != 1)} {', '.join(sorted(caller.scopes))}; "
                    f"{scope['method']} {path[:200]} needs '{needed}'. Its operator makes another with "
                    f"`tunegate keys create --scopes {needed},…`.",
                    code="insufficient_permissions",
                )
        return caller

    def _check_origin(self, host: bytes, origin: bytes, n_hosts: int) -> None:
        """A page in a browser must not reach a server on its visitor's own machine, under whatever name it found it."""
        name = _name_of(host)
        # Who rebinds a name comes under a name: an address cannot be rebound.
        if n_hosts > 1 or not (self._is_ours(name) or (not self._local and _is_address(name))):
            names = b", ".join([b"localhost", b"127.0.0.1", *sorted(self._hosts)]).decode("latin-1")
            raise Misdirected(
                f"the Host header is {host[:100].decode('latin-1')!r}; this server answers as {names} only (`hosts` in the "
                "settings names others)"
            )
        if not origin:
            return
        shown_by = _name_of(origin.partition(b"://")[2])
        # An address is anybody's: a page's may be no other than the one that this server was reached at.
        if not (self._is_ours(shown_by) or (shown_by == name and _is_address(name))):
            raise Forbidden(f"requests from the origin {origin[:100].decode('latin-1')!r} are refused")

    def _is_ours(self, name: bytes) -> bool:
        return (
            name in (b"localhost", b"[::1]")
            or (name.startswith(b"127.") and name.count(b".") == 3 and name.replace(b".", b"").isdigit())
            or name in self._hosts
        )


def resource_of(path: str) -> str:
    """What a path is about, as metrics and traces name it: one of few words."""
    parts = path.split("/", 3)
    resource = parts[2] if len(parts) > 2 and parts[1] == "v1" else ""
    return resource if resource in RESOURCES or resource == "organization" else "other"


def scope_of(method: str, path: str) -> access.Scope:
    """What a key must be allowed for this request; `admin` for all that is not known."""
    parts = path.split("/", 4)
    if len(parts) < 3 or parts[0] or parts[1] != "v1":
        return "infer" if path in TEMPLATE_PROBES else "admin"
    resource = parts[2]
    if resource == "models" and method not in ("GET", "HEAD"):
        return "tune"
    if resource == "templates" and method not in ("GET", "HEAD"):
        return "admin"  # a template changes what others are served through
    if resource == "fine_tuning" and parts[3:4] == ["checkpoints"]:
        return "admin"  # who may see a model of which project
    return RESOURCES.get(resource, "admin")


async def _end_revoked(status: int, events: bool, scope: Scope, receive: Receive, send: Send) -> None:
    """Tells a client that its key was revoked while it was being answered; a reply that is no stream just breaks off."""
    error = Unauthorized("This API key was revoked.")
    if not status:
        await error_response(error)(scope, receive, send)
    elif events:
        await send({"type": "http.response.body", "body": b"data: " + orjson.dumps(error.body()) + b"\n\n"})


def _name_of(authority: bytes) -> bytes:
    """Without the port, in lower case."""
    name = authority.rpartition(b":")[0] if authority[-1:].isdigit() and b":" in authority else authority
    return name.lower()


def _is_address(name: bytes) -> bool:
    try:
        ipaddress.ip_address(name.strip(b"[]").decode("ascii"))
    except ValueError:
        return False
    return True
