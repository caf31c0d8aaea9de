"""One socket to an engine: bytes → the events of the stream that it carries. On the hot path, on the gateway's loop.

A raw asyncio protocol with httptools' parser, since every layer more costs microseconds a token.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import httptools

from gateway.access import TRACEPARENT
from gateway.errors import EngineError

if TYPE_CHECKING:
    from gateway.engines.client import Endpoint, EngineStream

FRAME_LIMIT_BYTES = 32 * 1024 * 1024


class Connection(asyncio.Protocol):
    """One socket to an engine. It carries one stream at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.paused = False
        self._transport: asyncio.Transport | None = None
        self._stream: EngineStream | None = None
        self._buffer = b""
        self._status = 0
        self._retry_after: int | None = None
        self._whole = True  # the answer is one JSON body, not an event stream
        self._parts: list[bytes] = []
        self._size_bytes = 0

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def start(self, stream: EngineStream, request: bytes) -> None:
        self._stream = stream
        self._buffer, self._status, self._retry_after = b"", 0, None
        self._whole, self._parts, self._size_bytes = True, [], 0
        self._parser = httptools.HttpResponseParser(self)
        if self._transport is None or self._transport.is_closing():
            self._stream = None
            stream.on_lost()
        else:
            self._transport.write(request)

    def abort(self) -> None:
        self._stream = None
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        if not self.paused and self.usable:
            self.paused = True
            cast(asyncio.Transport, self._transport).pause_reading()

    def resume(self) -> None:
        self.paused = False
        if self.usable:
            cast(asyncio.Transport, self._transport).resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream is None:
            self.abort()  # an engine that speaks unasked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            stream.on_error(EngineError(f"the engine's answer is not HTTP: {error}"))
            return
        if self._stream is stream:
            stream.on_batch()

    def connection_lost(self, exc: Exception | None) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.on_lost()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"retry-after" and value.isdigit():
            self._retry_after = int(value)
        elif name == b"content-type":
            self._whole = not value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._whole:
            self._parts.append(body)
            self._size_bytes += len(body)
            if self._size_bytes > FRAME_LIMIT_BYTES and self._stream is not None:
                self._stream.on_error(EngineError(f"the engine answered with more than {FRAME_LIMIT_BYTES} bytes"))
            return
        if self._buffer:
            body = self._buffer + body
        *events, rest = body.split(b"\n\n")
        self._buffer = rest
        stream = self._stream
        if stream is None:
            return
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                stream.on_event(event[6:])
            elif payload := _payload(event):
                stream.on_event(payload)
        if len(rest) > FRAME_LIMIT_BYTES:
            stream.on_error(EngineError(f"the engine sent a frame of more than {FRAME_LIMIT_BYTES} bytes"))

    def on_message_complete(self) -> None:
        stream, self._stream = self._stream, None
        if stream is None:
            return
        if self._status != 200:
            stream.on_refusal(self._status, self._retry_after, b"".join(self._parts) or self._buffer)
        elif self._whole:
            stream.on_event(b"".join(self._parts))
            stream.on_event(b"[DONE]")
        stream.on_complete()


def request_bytes(endpoint: Endpoint, path: str, body: bytes) -> bytes:
    """The whole POST as it goes out."""
    traceparent = TRACEPARENT.get()
    trace = "" if traceparent is None else f"traceparent: {traceparent}\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {endpoint.host}:{endpoint.port}\r\n"
        f"authorization: Bearer {endpoint.key}\r\ncontent-type: application/json\r\n"
        f"{trace}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode("latin-1") + body


def _payload(event: bytes) -> bytes:
    """The data of an event written in any other way that server-sent events allow (comments have none)."""
    lines = event.replace(b"\r\n", b"\n").split(b"\n")
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
