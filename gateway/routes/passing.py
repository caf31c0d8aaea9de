"""Requests for an upstream's model: asked as they are, and its answer sent on, byte for byte, as it comes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import Receive, Send

from gateway.access import Caller
from gateway.errors import TunegateError
from gateway.inference import Inference
from gateway.routes.reply import Departure
from gateway.wire import upstream as wire

if TYPE_CHECKING:
    from gateway.engines.upstream import Upstream, UpstreamReply

logger = logging.getLogger("tunegate.reply")


async def pass_on(
    inference: Inference,
    upstream: Upstream,
    path: str,
    body: dict[str, Any],
    caller: Caller,
    receive: Receive,
    send: Send,
) -> None:
    """Answers a request by asking the upstream; when the client leaves, the upstream's connection is closed at once."""
    asked = wire.check(path, body)
    with Departure(receive):
        async with inference.passing(caller):
            await _pass_on(upstream, path, asked, send)


async def _pass_on(upstream: Upstream, path: str, body: dict[str, Any], send: Send) -> None:
    reply = await upstream.ask(path, body)
    try:
        await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
        await _send_chunks(reply, send)
    finally:
        await reply.close()


async def _send_chunks(reply: UpstreamReply, send: Send) -> None:
    """An event stream that breaks off ends with an error event; any other answer by its connection being closed."""
    try:
        async for chunk in reply.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except TunegateError as error:
        logger.warning("an upstream's reply broke off: %s", error.message)
        if not reply.is_event_stream:
            return  # unfinished: the server closes the connection
        data = b"\n\ndata: " + orjson.dumps(error.body()) + b"\n\n"  # its last event may have been cut in two
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
