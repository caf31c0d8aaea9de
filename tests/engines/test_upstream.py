"""An upstream that other settings have replaced: what was begun is finished, with its second try, and nothing crashes."""

from __future__ import annotations

import asyncio

import pytest

from gateway.engines.client import Deadlines
from gateway.engines.upstream import Upstream
from gateway.errors import EngineUnavailable

pytestmark = pytest.mark.anyio


async def test_one_that_is_replaced_between_two_tries_makes_the_second_and_is_closed_then() -> None:
    retiring: list[Upstream] = []
    answers = [b"HTTP/1.1 500 X\r\ncontent-length: 2\r\n\r\n{}", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await retiring[0].retire()
        writer.write(answers.pop(0))
        await writer.drain()
        writer.close()

    servers = [await asyncio.start_server(serve, "127.0.0.1", 0) for _ in range(2)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1" for server in servers]
    upstream = Upstream("judge", urls, None, None, Deadlines(5, 5))
    retiring.append(upstream)
    reply = await upstream.ask("/chat/completions", {"model": "judge", "messages": []})
    assert reply.status == 200 and b"".join([chunk async for chunk in reply.chunks()]) == b"{}"
    await reply.close()
    with pytest.raises(EngineUnavailable, match="ask again"):
        await upstream.ask("/chat/completions", {"model": "judge", "messages": []})
    for server in servers:
        server.close()
