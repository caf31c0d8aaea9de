"""Thin: parse → do → respond. One module a resource; objects come from `request.app.state`."""

from __future__ import annotations

from starlette.requests import Request


def project_of(request: Request) -> str:
    """The project that a request speaks for. There is one until keys bring more."""
    return "default"
