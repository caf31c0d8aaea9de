"""`Idempotency-Key`: one object however often a request is sent."""

from __future__ import annotations

from starlette.requests import Request

from gateway.wire.fine_tuning import parse_idempotency_key


def idempotency_key(request: Request) -> str | None:
    """The header, where there is one. Raises RequestError for one that is too long."""
    return parse_idempotency_key(request.headers.get("idempotency-key"))
