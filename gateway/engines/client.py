"""The hot path to an engine: one POST, its event stream read frame by frame from the socket. Runs on the gateway's loop.

A raw asyncio protocol with httptools' parser, since every layer more costs microseconds a token. Frames that arrived together
are handed over together; a slow reader pauses the socket, so nothing grows without bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import httptools
import orjson

from gateway.access import TRACEPARENT
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable, RequestError

_PAUSE_AT, _FRAME_LIMIT_BYTES = 256, 32 * 1024 * 1024
_IDLE_LIMIT = 64


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an engine answers, and the key that it asks for."""

    host: str
    port: int
    key: str


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that an engine may take."""

    first_token_s: float
    between_tokens_s: float
    connect_s: float = 5.0


class Holder(Protocol):
    """What must stay while a stream runs: an engine that is started for it, say."""

    async def hold(self) -> None: ...
    def release(self) -> None: ...


class EngineClient:
    """Connections to one engine, kept for the next request."""

    def __init__(self, endpoint: Callable[[], Endpoint], deadlines: Deadlines, holder: Holder | None = None) -> None:
        """`endpoint` is asked for each request: a restarted engine has another port and key.

        `holder` is held by each stream, from before it begins to its end.
        """
        self._endpoint = endpoint
        self._holder = holder
        self._deadlines = deadlines
        self._idle: list[_Connection] = []

    async def stream(self, body: dict[str, Any], path: str = "/v1/completions") -> EngineStream:
        """Starts a POST and returns its stream before anything came back.

        An answer that is no event stream (`stream` false) comes as one frame.

        Raises EngineUnavailable when the engine cannot be reached.
        """
        if self._holder is None:
            return await self._start(body, path)
        await self._holder.hold()
        try:
            return await self._start(body, path)
        except BaseException:
            self._holder.release()
            raise

    async def _start(self, body: dict[str, Any], path: str) -> EngineStream:
        endpoint = self._endpoint()
        try:
            request = _request(endpoint, path, orjson.dumps(body))
        except orjson.JSONEncodeError:  # what a client may send is checked everywhere but for this
            raise RequestError("The request holds something that is nested too deeply.") from None
        connection, fresh = self._reuse(endpoint), False
        if connection is None:
            connection, fresh = await self._connect(endpoint), True
        stream = EngineStream(self, connection, endpoint, request, self._deadlines, may_retry=not fresh)
        connection.start(stream, request)
        return stream

    def close(self) -> None:
        """Closes the idle connections; streams that run go on."""
        while self._idle:
            self._idle.pop().abort()

    def _reuse(self, endpoint: Endpoint) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.endpoint == endpoint:
                return connection
            connection.abort()
        return None

    def _ended(self) -> None:
        if self._holder is not None:
            self._holder.release()

    def _keep(self, connection: _Connection) -> None:
        if len(self._idle) < _IDLE_LIMIT and connection.usable:
            self._idle.append(connection)
        else:
            connection.abort()

    async def _connect(self, endpoint: Endpoint) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._deadlines.connect_s):
                _, protocol = await loop.create_connection(lambda: _Connection(endpoint), endpoint.host, endpoint.port)
        except (OSError, TimeoutError) as error:
            raise EngineUnavailable(f"the engine cannot be reached: {error}", retry_after_s=1) from error
        return protocol


class EngineStream:
    """One reply under way. `await frames()` until it gives an empty list; then it is over."""

    def __init__(
        self,
        client: EngineClient,
        connection: _Connection,
        endpoint: Endpoint,
        request: bytes,
        deadlines: Deadlines,
        *,
        may_retry: bool,
    ) -> None:
        self._client, self._connection, self._endpoint = client, connection, endpoint
        self._request, self._may_retry = request, may_retry
        self._loop = asyncio.get_running_loop()
        self._frames: list[dict[str, Any]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._over = self._done = False
        self._deadlines = deadlines
        self._last_at = self._loop.time()
        self._began = False
        self._timer = self._loop.call_later(deadlines.first_token_s, self._check_deadline)

    async def frames(self) -> list[dict[str, Any]]:
        """The frames that came since the last call, at least one; empty when the reply is over.

        Raises EngineError, EngineTimeout or, for what the engine refused, RequestError.
        """
        while not self._frames:
            if self._error is not None:
                raise self._error
            if self._over:
                return []
            if self._connection.lost_early and self._may_retry and not self._began:
                await self._retry()
                continue
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        frames, self._frames = self._frames, []
        if self._connection.paused:
            self._connection.resume()
        return frames

    def cancel(self) -> None:
        """Stops the reply now: the engine sees its connection close and frees the sequence."""
        if not self._over:
            self._end()
            self._connection.abort()
            self._wake()

    # called by the connection

    def on_event(self, payload: bytes) -> None:
        self._began = True
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            frame = orjson.loads(payload)
        except orjson.JSONDecodeError:
            self.on_error(EngineError("the engine sent a frame that is not JSON"))
            return
        if "error" in frame:
            self.on_error(EngineError(f"the engine stopped: {_error_message(frame)}"))
            return
        self._frames.append(frame)

    def on_batch(self) -> None:
        """All events of one read were handed over."""
        self._last_at = self._loop.time()
        if len(self._frames) > _PAUSE_AT:
            self._connection.pause()
        self._wake()

    def on_refusal(self, status: int, retry_after: int | None, body: bytes) -> None:
        self._began = True
        self.on_error(_refusal(status, retry_after, body))

    def on_complete(self) -> None:
        """The response ended as HTTP says it should."""
        self._end()
        if self._error is None and not self._done:
            self._error = EngineError("the engine ended its stream before it was complete")
        if self._error is None:
            self._client._keep(self._connection)
        self._wake()

    def on_lost(self) -> None:
        if self._over:
            return
        if self._may_retry and not self._began:
            self._wake()  # frames() connects again
            return
        self.on_error(
            EngineError("the engine went away in the middle of its reply")
            if self._began
            else EngineUnavailable("the engine went away before it answered", retry_after_s=1)
        )

    def on_error(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._end()
        self._connection.abort()
        self._wake()

    def _end(self) -> None:
        """Once: nothing more will come."""
        if not self._over:
            self._over = True
            self._timer.cancel()
            self._client._ended()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _retry(self) -> None:
        """A kept connection was closed by its engine just then: nothing was begun, so once more on a new one."""
        self._may_retry = False
        self._connection = await self._client._connect(self._endpoint)
        if self._over:
            self._connection.abort()
        else:
            self._connection.start(self, self._request)

    def _check_deadline(self) -> None:
        limit = self._deadlines.between_tokens_s if self._began else self._deadlines.first_token_s
        left = self._last_at + limit - self._loop.time()
        if self._connection.paused or left > 0:
            self._timer = self._loop.call_later(max(left, 1.0), self._check_deadline)
        else:
            what = "between two tokens" if self._began else "for the first token"
            self.on_error(EngineTimeout(f"the engine took longer than {limit:g} s {what}"))


class _Connection(asyncio.Protocol):
    """One socket to an engine. It carries one stream at a time."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.paused = False
        self.lost_early = False
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
            self.lost_early = True
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
        self.lost_early = True
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
            if self._size_bytes > _FRAME_LIMIT_BYTES and self._stream is not None:
                self._stream.on_error(EngineError(f"the engine answered with more than {_FRAME_LIMIT_BYTES} bytes"))
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
        if len(rest) > _FRAME_LIMIT_BYTES:
            stream.on_error(EngineError(f"the engine sent a frame of more than {_FRAME_LIMIT_BYTES} bytes"))

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


def _request(endpoint: Endpoint, path: str, body: bytes) -> bytes:
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


def _error_message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]


def _refusal(status: int, retry_after: int | None, body: bytes) -> Exception:
    param = None
    try:
        told = orjson.loads(body)
        message = _error_message(told)
        if isinstance(told, dict) and isinstance(told.get("error"), dict):
            param = told["error"].get("param")
    except orjson.JSONDecodeError:
        message = body[:200].decode("utf-8", "replace")
    if status in (429, 503):
        return EngineUnavailable(f"the engine is busy: {message}", retry_after_s=retry_after or 1)
    if status == 400:
        return RequestError(f"the engine refused the request: {message}", param=param)
    return EngineError(f"the engine answered {status}: {message}")
