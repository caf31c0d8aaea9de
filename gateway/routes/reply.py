"""What chat and plain completions share on the way out: headers, a watch for the client leaving, the event stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import orjson
from starlette.responses import Response
from starlette.types import Receive, Send

from gateway.errors import BodyTooLarge, EngineError, TunegateError, Unauthorized

logger = logging.getLogger("tunegate.reply")

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
DONE = b"data: [DONE]\n\n"


def error_bytes(error: TunegateError) -> bytes:
    """OpenAI's error object as it is sent."""
    return orjson.dumps(error.body())


def error_response(error: TunegateError) -> Response:
    """OpenAI's error object, with the headers that go with it."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, BodyTooLarge):
        headers["Connection"] = "close"  # else the rest of the body would be read and thrown away, however long it is
    return Response(error_bytes(error), error.status, headers, "application/json")


class Departure:
    """Notices that the client left, and ends at once what is done for it: this task, or what `ends` names.

        with Departure(receive) as departure:
            generation = await inference.chat(…)  # is cancelled when the client leaves
            departure.ends(generation.cancel)  # from here on, that is called instead
            …

    `gone` says so afterwards. The cancellation of its own making ends with the block.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    def __enter__(self) -> Self:
        waiting = asyncio.current_task()
        assert waiting is not None
        self._waiting = waiting
        self._end: Callable[[], object] = waiting.cancel
        self._watching = asyncio.ensure_future(self._watch())
        return self

    def ends(self, end: Callable[[], object]) -> None:
        self._end = end
        if self.gone:
            end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._watching.cancel()
        return self.gone and kind is asyncio.CancelledError and self._waiting.uncancel() == 0

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._end()


async def send_json(send: Send, body: bytes, status: int = 200) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_events(send: Send, events: AsyncIterator[bytes]) -> None:
    """Sends what `events` yields; the status goes out with the first of it, so an earlier error still gets its own.

    A later error becomes one `data: {"error": …}` without [DONE], and the connection closes.
    """
    started = False
    try:
        async for data in events:
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except TunegateError as error:
        if not started:
            raise
        if not isinstance(error, EngineError):
            logger.exception("a stream failed")
        data = b"data: " + orjson.dumps(error.body()) + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
