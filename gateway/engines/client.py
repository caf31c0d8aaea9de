"""The hot path to an engine: one POST, and its event stream frame by frame (see `connection`). Runs on the gateway's loop.

Which of a base's engines is asked, its router says; until the first frame has come another may be asked in its place. Frames
that arrived together are handed over together; a slow reader pauses the socket, so nothing grows without bound.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import orjson

from gateway.engines.connection import Connection, request_bytes
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable, RequestError, TunegateError

log = logging.getLogger(__name__)

_PAUSE_AT = 256
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


class Replica(Protocol):
    """One engine of those that may answer, told how it does. Each `begin` has its `end`."""

    served_name: str | None  # what it calls the base, where that is not the base's own name
    idle: list[Any]  # connections of ours, kept for the next request
    retried: int  # requests that went on to another

    @property
    def endpoint(self) -> Endpoint: ...
    def begin(self, model: str) -> None: ...
    def answered(self) -> None: ...
    def turned_away(self) -> None: ...
    def failed(self, how: str) -> None: ...
    def end(self, model: str) -> None: ...


class Router(Protocol):
    """Who says which engine a request goes to. It is held from before a request begins to the end of its reply."""

    @property
    def name(self) -> str: ...
    @property
    def replicas(self) -> Iterable[Replica]: ...
    def choose(self, body: dict[str, Any], but_not: Any = None) -> Replica: ...
    async def hold(self, model: str | None = None) -> None: ...
    def release(self) -> None: ...


class EngineClient:
    """Asks the engines of one base; connections are kept for the next request."""

    def __init__(self, router: Router, deadlines: Deadlines) -> None:
        """`router` is asked for each request: a restarted engine has another port and key."""
        self._router = router
        self._deadlines = deadlines

    async def stream(self, body: dict[str, Any], path: str = "/v1/completions") -> EngineStream:
        """Starts a POST and returns its stream before anything came back.

        An answer that is no event stream (`stream` false) comes as one frame.

        Raises EngineUnavailable when no engine can be reached; a second one was tried, where there is one.
        """
        await self._router.hold(body["model"])
        stream = EngineStream(self, body, path, self._deadlines)
        try:
            await stream.begin()
        except BaseException:
            stream.cancel()
            raise
        return stream

    def close(self) -> None:
        """Closes the idle connections; streams that run go on."""
        for replica in self._router.replicas:
            while replica.idle:
                replica.idle.pop().abort()

    # called by the stream

    def choose(self, body: dict[str, Any], but_not: Replica | None = None) -> Replica:
        return self._router.choose(body, but_not)

    def request(self, replica: Replica, endpoint: Endpoint, path: str, body: dict[str, Any]) -> bytes:
        """The bytes of a POST, in which the base has the replica's own name for it."""
        if replica.served_name is not None and body["model"] == self._router.name:
            body = {**body, "model": replica.served_name}
        try:
            return request_bytes(endpoint, path, orjson.dumps(body))
        except orjson.JSONEncodeError:  # what a client may send is checked everywhere but for this
            raise RequestError("The request holds something that is nested too deeply.") from None

    def reuse(self, replica: Replica, endpoint: Endpoint) -> Connection | None:
        while replica.idle:
            connection: Connection = replica.idle.pop()
            if connection.usable and connection.endpoint == endpoint:
                return connection
            connection.abort()
        return None

    def keep(self, replica: Replica, connection: Connection) -> None:
        if len(replica.idle) < _IDLE_LIMIT and connection.usable:
            replica.idle.append(connection)
        else:
            connection.abort()

    async def connect(self, endpoint: Endpoint) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._deadlines.connect_s):
                _, protocol = await loop.create_connection(lambda: Connection(endpoint), endpoint.host, endpoint.port)
        except (OSError, TimeoutError) as error:
            log.warning("engine at %s:%d: cannot be reached: %s", endpoint.host, endpoint.port, error)
            raise EngineUnavailable("the engine cannot be reached", retry_after_s=1) from error
        return protocol

    def ended(self) -> None:
        self._router.release()


class EngineStream:
    """One reply under way. `await frames()` until it gives an empty list; then it is over.

    Until its first frame it may be asked again, unnoticed: of the same replica where a kept connection turned out to be closed,
    and once of another replica where this one cannot be reached, is lost, is busy or fails. After that frame, never.
    """

    def __init__(self, client: EngineClient, body: dict[str, Any], path: str, deadlines: Deadlines) -> None:
        self._client, self._body, self._path = client, body, path
        self._replica: Replica | None = None
        self._connection: Connection | None = None
        self._kept = False  # the connection had carried a reply before
        self._retried = False
        self._loop = asyncio.get_running_loop()
        self._frames: list[dict[str, Any]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._obstacle: TunegateError | None = None  # why it has to be asked again
        self._over = self._done = False
        self._deadlines = deadlines
        self._last_at = self._loop.time()
        self._began = False
        self._timer = self._loop.call_later(deadlines.first_token_s, self._check_deadline)

    async def begin(self) -> None:
        """Sends the request. Called once, by the client."""
        try:
            await self._ask(self._client.choose(self._body))
        except EngineUnavailable as error:
            if self._replica is None:  # there was none to ask
                raise
            self._obstacle = error
            await self._ask_again()

    async def frames(self) -> list[dict[str, Any]]:
        """The frames that came since the last call, at least one; empty when the reply is over.

        Raises EngineError, EngineTimeout or, for what the engine refused, RequestError.
        """
        while not self._frames:
            if self._error is not None:
                raise self._error
            if self._over:
                return []
            if self._obstacle is not None:
                try:
                    await self._ask_again()
                except TunegateError as error:
                    self.on_error(error)
                continue
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        frames, self._frames = self._frames, []
        if self._connection is not None and self._connection.paused:
            self._connection.resume()
        return frames

    def cancel(self) -> None:
        """Stops the reply now: the engine sees its connection close and frees the sequence."""
        if not self._over:
            self._end()
            if self._connection is not None:
                self._connection.abort()
            self._wake()

    async def _ask(self, replica: Replica) -> None:
        """Sends the request to a replica, on a kept connection or a new one. Raises EngineUnavailable."""
        if replica is not self._replica:
            if self._replica is not None:
                self._replica.end(self._body["model"])
            self._replica = replica
            replica.begin(self._body["model"])
        endpoint = replica.endpoint
        request = self._client.request(replica, endpoint, self._path, self._body)
        connection = None if self._kept else self._client.reuse(replica, endpoint)
        self._kept = connection is not None
        if connection is None:
            try:
                connection = await self._client.connect(endpoint)
            except EngineUnavailable:
                replica.failed("connect")
                raise
        self._connection = connection
        if self._over:  # while it was being connected
            connection.abort()
        else:
            connection.start(self, request)

    async def _ask_again(self) -> None:
        """The one retry elsewhere, and before it another connection where a kept one was closed just then."""
        obstacle, self._obstacle = self._obstacle, None
        assert obstacle is not None and self._replica is not None
        if self._kept:
            try:
                return await self._ask(self._replica)
            except EngineUnavailable as error:
                obstacle = error
        if self._retried or self._over:
            raise obstacle
        self._retried = True
        failed = self._replica
        try:
            other = self._client.choose(self._body, but_not=failed)
        except EngineUnavailable:
            raise obstacle from None
        failed.retried += 1
        self._kept = False
        await self._ask(other)

    # called by the connection

    def on_event(self, payload: bytes) -> None:
        if self._over or self._obstacle is not None:  # what came together with an error
            return
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            frame = orjson.loads(payload)
        except orjson.JSONDecodeError:
            self.on_error(EngineError("the engine sent a frame that is not JSON"))
            return
        if "error" in frame:
            self._on_error_event(frame, payload)
            return
        if not self._began:
            self._began = True
            cast(Replica, self._replica).answered()
        self._frames.append(frame)

    def on_batch(self) -> None:
        """All events of one read were handed over."""
        self._last_at = self._loop.time()
        if len(self._frames) > _PAUSE_AT and self._connection is not None:
            self._connection.pause()
        self._wake()

    def on_refusal(self, status: int, retry_after: int | None, body: bytes) -> None:
        error = _refusal(status, retry_after, body)
        replica = cast(Replica, self._replica)
        if isinstance(error, EngineUnavailable):
            replica.turned_away()
            self._turn_elsewhere(error)
        elif isinstance(error, EngineError):
            replica.failed("refused")
            self._turn_elsewhere(error)
        else:
            replica.answered()
            self.on_error(error)

    def _on_error_event(self, frame: dict[str, Any], payload: bytes) -> None:
        """As the first of a reply it is a refusal: so answers the front of a vLLM, with status 200, when its engine is gone."""
        told = frame["error"]
        code = told.get("code") if isinstance(told, dict) else None
        if self._began:
            self.on_error(EngineError(f"the engine stopped: {_error_message(frame)}"))
        else:
            self.on_refusal(code if type(code) is int and 400 <= code < 600 else 500, None, payload)

    def on_complete(self) -> None:
        """The response ended as HTTP says it should."""
        if self._obstacle is not None or self._over:
            return
        replica, connection = self._replica, cast(Connection, self._connection)
        self._end()
        if self._error is None and not self._done:
            self._error = EngineError("the engine ended its stream before it was complete")
        if self._error is None:
            self._client.keep(cast(Replica, replica), connection)
        self._wake()

    def on_lost(self) -> None:
        if self._over:
            return
        if self._kept and not self._began:  # its engine closed it just then: nothing was begun
            self._obstacle = EngineUnavailable("the engine closed the connection", retry_after_s=1)
            self._wake()
            return
        cast(Replica, self._replica).failed("lost")
        if self._began:
            self.on_error(EngineError("the engine went away in the middle of its reply"))
        else:
            self._turn_elsewhere(EngineUnavailable("the engine went away before it answered", retry_after_s=1))

    def on_error(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._end()
        if self._connection is not None:
            self._connection.abort()
        self._wake()

    def _turn_elsewhere(self, error: TunegateError) -> None:
        """`frames` asks another replica, or raises the error where there is none."""
        if self._began or self._over:
            self.on_error(error)
            return
        self._obstacle, self._kept = error, False
        if self._connection is not None:
            self._connection.abort()
        self._wake()

    def _end(self) -> None:
        """Once: nothing more will come."""
        if not self._over:
            self._over = True
            self._timer.cancel()
            if self._replica is not None:
                self._replica.end(self._body["model"])
            self._client.ended()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check_deadline(self) -> None:
        limit = self._deadlines.between_tokens_s if self._began else self._deadlines.first_token_s
        left = self._last_at + limit - self._loop.time()
        if (self._connection is not None and self._connection.paused) or left > 0:
            self._timer = self._loop.call_later(max(left, 1.0), self._check_deadline)
        else:
            what = "between two tokens" if self._began else "for the first token"
            if self._replica is not None:
                self._replica.failed("timeout")
            self.on_error(EngineTimeout(f"the engine took longer than {limit:g} s {what}"))


def _error_message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else body
    return str(error.get("message", error) if isinstance(error, dict) else error)[:1000]


def _refusal(status: int, retry_after: int | None, body: bytes) -> TunegateError:
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
