"""Thin: parse → do → respond. One module a resource; objects come from `request.app.state`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request

from gateway.access import ANYBODY, Caller

# Where `gateway.front` leaves them in the ASGI scope.
CALLER = "tunegate.caller"
REQUEST_ID = "tunegate.request_id"


def caller_of(scope: MutableMapping[str, Any]) -> Caller:
    """Who a request speaks for, as its key says; hand it on to whatever reads, writes or asks on its behalf."""
    caller: Caller = scope.get(CALLER, ANYBODY)
    return caller


def project_of(request: Request) -> str:
    """The project that a request speaks for."""
    return caller_of(request.scope).project_id
