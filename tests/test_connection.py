"""What is no proper request, on a raw socket: refused in OpenAI's shape, closed in time, and the next one is answered."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.connection import MAX_HEADER_BYTES, Connection, Server

PATIENCE_S = 1.0


class Hasty(Connection):
    patience_s = PATIENCE_S


class HastyServer(Server):
    sweep_s = 0.2


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with how many bytes the body had."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(echo, port=0, http=Hasty, loop="uvloop", ws="none", lifespan="off", log_config=None)
    server = HastyServer(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def answered(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """All that came back until the server closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
        return b"".join(parts)


def check_refused(reply: bytes, status: int) -> None:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), reply
    assert b"\r\nx-request-id: req_" in head and b"\r\nconnection: close" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
    ],
)
def test_what_can_be_read_in_two_ways_is_400_and_closed(port: int, request_bytes: bytes) -> None:
    check_refused(answered(port, request_bytes), 400)


@pytest.mark.parametrize(
    "headers",
    [
        b"".join(b"x-%d: y\r\n" % n for n in range(200)),
        b"x: " + b"y" * (MAX_HEADER_BYTES + 1000) + b"\r\n",
        b"".join(b"x-%d: %s\r\n" % (n, b"y" * 4000) for n in range(20)),
    ],
)
def test_headers_that_are_many_or_huge_are_431(port: int, headers: bytes) -> None:
    check_refused(answered(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n"), 431)
    check_refused(answered(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + headers * (80_000 // len(headers) + 1)), 431)


def test_slow_headers_and_slow_bodies_are_closed_and_slow_ones_of_some_rate_are_not(port: int) -> None:
    began = time.monotonic()
    check_refused(answered(port, b"GET / HTTP/1.1\r\nHost: x\r\n"), 408)
    body = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    check_refused(answered(port, body, b"a"), 408)
    assert answered(port) == b"", "who never asks is closed without a word"
    assert time.monotonic() - began < 3 * (PATIENCE_S + 1.5)
    close = body.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    fast_enough = answered(port, close, *[b"a" * 10_000] * 10, pause_s=0.25)
    assert fast_enough.endswith(b"100000\r\n0\r\n\r\n"), fast_enough


def test_a_drip_does_not_hold_a_connection(port: int) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        with pytest.raises(OSError):  # reset or closed
            while time.monotonic() - began < 10:
                connection.sendall(b"a")
                time.sleep(0.05)
    assert time.monotonic() - began < PATIENCE_S + 2


def test_several_requests_on_one_connection_are_answered_in_order(port: int) -> None:
    one = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    last = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nConnection: close\r\n\r\na"
    reply = answered(port, one + one + last)
    assert reply.count(b"HTTP/1.1 200") == 3 and [p for p in reply.split(b"\r\n") if p in (b"3", b"1")][-1] == b"1"
