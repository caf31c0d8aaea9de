"""Request bodies: read up to a limit, parsed as JSON objects."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.types import Receive

from gateway.errors import BodyTooLarge, RequestError
from gateway.settings import Settings


class ClientLeft(Exception):
    """The client closed its connection before its request was whole: nobody is there to be answered."""


async def read_json(request: Request, limit_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Raises RequestError, BodyTooLarge."""
    return parse_json(await read_body(request.receive, limit_bytes))


async def read_asked(receive: Receive, settings: Settings, resource: str) -> dict[str, Any]:
    """The body of a request for a reply: without the fields that the operator lets go unread, with the default model."""
    body = parse_json(await read_body(receive, settings.limits.body_bytes))
    for setting in settings.ignored_fields:
        of, _, name = setting.partition(".")
        if of == resource:
            body.pop(name, None)
    if settings.default_model is not None and body.get("model") is None:
        body["model"] = settings.default_model
    return body


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is over the limit, ClientLeft when it breaks off."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        if len(body) > limit_bytes:
            raise _too_large(limit_bytes)
        return body
    parts, size = [], 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def parse_json(body: bytes) -> dict[str, Any]:
    """The object in a body. Raises RequestError that says where it is not JSON."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"We could not parse the JSON body of your request: {error}. The body must be a JSON object."
        ) from error
    if not isinstance(value, dict):
        raise RequestError(f"The body must be a JSON object, not {type(value).__name__}.")
    return value


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit_bytes} bytes, the limit of this server.")
