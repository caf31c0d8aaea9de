"""A client's connection: uvicorn's, with an end to patience and to headers, and OpenAI's error object for what is no HTTP.

Its one rule: nobody holds a connection for nothing. Headers must be whole within PATIENCE_S, a body must come at MIN_RATE at
least. Looking after that costs a request nothing: the server's own tick goes over the connections every few seconds.
"""

from __future__ import annotations

import secrets
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import RequestError, TunegateError
from gateway.routes.reply import error_bytes

PATIENCE_S = 25.0  # with SWEEP_S: at most 30 s
SWEEP_S = 5.0
MIN_RATE = 1000  # bytes a second of a body, over PATIENCE_S
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 * 1024
TICK_S = 0.1  # how often uvicorn calls `on_tick`


class HeadersTooLarge(RequestError):
    status = 431


class TooSlow(RequestError):
    status = 408


class Connection(HttpToolsProtocol):
    """One connection and the requests on it, one after another."""

    patience_s = PATIENCE_S

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since: float | None = self.loop.time()  # when what we wait for began; None: it is not the client's turn
        self._in_headers = True
        self._received = 0
        self._refusal: TunegateError | None = None

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self._in_headers and self._received > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refusal = _headers_too_large()
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = True
        if self._since is None:
            self._since = self.loop.time()

    def on_headers_complete(self) -> None:
        if len(self.headers) > MAX_HEADERS or (
            self._received > MAX_HEADER_BYTES
            and sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEADER_BYTES
        ):
            self._refusal = _headers_too_large()
            raise self._refusal  # through the parser to `data_received`, which refuses
        self._in_headers = False
        self._since = self.loop.time()
        self._received = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._since = None
        self._in_headers = True
        self._received = 0

    def check_patience(self, now: float) -> None:
        """Closes the connection when its client is too slow."""
        if self._since is None or now - self._since < self.patience_s or self.transport.is_closing():
            return
        if not self._in_headers and (self.flow.read_paused or self._received >= MIN_RATE * self.patience_s):
            self._since, self._received = now, 0  # it is we who do not read, or it is fast enough
            return
        if self._in_headers and not self._received:
            self.transport.close()  # nothing was ever asked
            return
        what = "headers were not whole" if self._in_headers else "body came too slowly"
        self._refusal = TooSlow(f"The request's {what} within {self.patience_s:g} s.")
        self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Says what is wrong, where that can still be said, and closes."""
        error = self._refusal or RequestError("This is not an HTTP request that can be read.")
        self._refusal = None
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            if self.cycle is not None:
                self.cycle.disconnected = True  # whoever works on it is told that nobody listens any more
                self.cycle.message_event.set()
            body = error_bytes(error)
            lines = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
                "content-type: application/json",
                f"content-length: {len(body)}",
                f"x-request-id: req_{secrets.token_hex(16)}",
                "openai-version: 2020-10-01",
                "connection: close",
            )
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Goes over its connections every SWEEP_S."""

    sweep_s = SWEEP_S

    async def on_tick(self, counter: int) -> bool:
        if counter % max(1, int(self.sweep_s / TICK_S)) == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check_patience(connection.loop.time())
        return await super().on_tick(counter)


def _headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"A request may have {MAX_HEADERS} headers, of {MAX_HEADER_BYTES} bytes together.")
