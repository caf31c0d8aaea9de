"""A client that leaves, on a real socket: what is waited for on its behalf is cancelled, and what was begun is ended."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.connection import Connection, Server
from gateway.routes.reply import Departure

LEFT_S = 5.0


@dataclass
class App:
    """Waits for an engine that never comes, or, on /begun, for a reply that ends when it is cancelled."""

    seen: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        with Departure(receive) as departure:
            self.seen.append("begins")
            if scope["path"] == "/begun":
                over = asyncio.Event()
                departure.ends(over.set)
                await over.wait()
                self.seen.append("was ended")
            else:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.seen.append("was cancelled")
        await asyncio.sleep(0)  # nothing of the cancellation is left
        self.seen.append(f"gone: {departure.gone}")


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def port(app: App) -> Iterator[int]:
    config = uvicorn.Config(app, port=0, http=Connection, loop="uvloop", ws="none", lifespan="off", log_config=None)
    server = Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LEFT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("path", "end"), [("/", "was cancelled"), ("/begun", "was ended")])
def test_what_is_done_for_a_client_ends_when_it_leaves(app: App, port: int, path: str, end: str) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        until(lambda: app.seen == ["begins"])
    until(lambda: len(app.seen) == 3)
    assert app.seen == ["begins", end, "gone: True"]
