"""`/healthz` says that the process answers; `/readyz` that every base can be asked: its engine answers, or starts on demand."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def healthz(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    bases = dict.fromkeys(request.app.state.starting(), False)  # also those that are not whole yet
    bases |= {base.name: base.engine.ready or base.engine.resting for base in request.app.state.catalog.bases}
    ready = bool(bases) and all(bases.values())
    body: dict[str, object] = {"status": "ready" if ready else "starting"}
    if not request.app.state.keyring.required:  # who asks has no key, and names are for those who have one
        body["engines"] = bases
    return JSONResponse(body, status_code=200 if ready else 503, headers={} if ready else {"Retry-After": "1"})


routes = [Route("/healthz", healthz, methods=["GET"]), Route("/readyz", readyz, methods=["GET"])]
