"""The hot client against a fake engine on a real port: the fake does what a real engine cannot be made to do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.engines.client import Deadlines, EngineClient
from gateway.errors import EngineError, EngineTimeout, EngineUnavailable, RequestError
from tests.engines.parts import At, pool_of

pytestmark = pytest.mark.anyio

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def frame(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "token_ids": [len(text)], "text": text}]}


def event(data: bytes) -> bytes:
    body = b"data: " + data + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


FRAMES = [frame("a"), frame("bé"), frame("")]
REPLY = HEAD + b"".join(event(json.dumps(f).encode()) for f in FRAMES) + event(b"[DONE]") + b"0\r\n\r\n"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await reader.readexactly(size)


@asynccontextmanager
async def engine(serve: Serve, **deadlines: float) -> AsyncIterator[tuple[EngineClient, list[int]]]:
    """A client of an engine that answers each connection by `serve`, and the list of connections that it took."""
    connections: list[int] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client closed, as some of these tests make it do
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    limits = Deadlines(**{"first_token_s": 5.0, "between_tokens_s": 5.0, **deadlines})
    client = EngineClient(pool_of(At(port)), limits)
    try:
        yield client, connections
    finally:
        client.close()
        server.close()


async def read_all(client: EngineClient) -> list[dict[str, Any]]:
    stream = await client.stream({"model": "tiny", "prompt": [1]})
    read: list[dict[str, Any]] = []
    while frames := await stream.frames():
        read += frames
    return read


async def test_frames_are_the_same_wherever_the_bytes_are_split() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for cut in range(1, len(REPLY), 7):
            await read_request(reader)
            writer.write(REPLY[:cut])
            await writer.drain()
            await asyncio.sleep(0.001)
            writer.write(REPLY[cut:])
            await writer.drain()

    async with engine(serve) as (client, connections):
        for _ in range(1, len(REPLY), 7):
            assert await read_all(client) == FRAMES
        assert len(connections) == 1, "the connection is kept"


async def test_frames_come_one_byte_at_a_time() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for at in range(len(REPLY)):
            writer.write(REPLY[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)

    async with engine(serve) as (client, _):
        assert await read_all(client) == FRAMES


async def test_the_request_carries_the_key_and_the_body() -> None:
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await read_request(reader))
        writer.write(REPLY)

    async with engine(serve) as (client, _):
        await read_all(client)
    assert b"authorization: Bearer secret\r\n" in seen[0]
    assert seen[0].endswith(b'{"model":"tiny","prompt":[1]}')


async def test_comments_and_multiline_events_are_read_as_the_standard_says() -> None:
    odd = b': keep-alive\n\nevent: x\ndata: {"choices":\ndata: []}\n\n'
    body = HEAD + b"%x\r\n%b\r\n" % (len(odd), odd) + event(b"[DONE]") + b"0\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(body)

    async with engine(serve) as (client, _):
        assert await read_all(client) == [{"choices": []}]


async def test_a_json_answer_comes_as_one_frame() -> None:
    body = json.dumps(frame("all")).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)

    async with engine(serve) as (client, _):
        assert await read_all(client) == [frame("all")]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (HEAD + event(b'{"choices":[]}') + b"0\r\n\r\n", "before it was complete"),
        (HEAD + event(b'{"choices":'), "not JSON"),
        (HEAD + event(b'{"error":{"message":"broke"}}'), "broke"),
        (HEAD + event(b'{"choices":[]}'), "in the middle"),
        (b"SSH-2.0-OpenSSH\r\n", "not HTTP"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\nboom", "answered 500: boom"),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n", "answered 302"),
    ],
)
async def test_an_engine_that_breaks_off_or_talks_nonsense_is_a_clean_error(reply: bytes, message: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(reply)
        await writer.drain()

    async with engine(serve) as (client, _):
        with pytest.raises(EngineError, match=message):
            await read_all(client)


async def test_what_the_engine_refuses_keeps_its_meaning() -> None:
    replies = [(b"400", RequestError), (b"503", EngineUnavailable)]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for status, _ in replies:
            await read_request(reader)
            body = b'{"error":{"message":"no room"}}'
            head = b"HTTP/1.1 %b X\r\nretry-after: 7\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % (status, len(body)) + body)
            await writer.drain()

    async with engine(serve) as (client, _):
        with pytest.raises(RequestError, match="no room"):
            await read_all(client)
    replies.pop(0)
    async with engine(serve) as (client, _):
        with pytest.raises(EngineUnavailable, match="no room") as refused:
            await read_all(client)
        assert refused.value.retry_after_s == 7


async def test_a_kept_connection_that_the_engine_closed_is_replaced_once() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(REPLY)
        await writer.drain()
        await reader.read(1)  # the second request arrives, and the connection closes unanswered

    async with engine(serve) as (client, connections):
        assert await read_all(client) == FRAMES
        assert await read_all(client) == FRAMES
        assert len(connections) == 2


async def test_an_engine_that_is_not_there_is_unavailable() -> None:
    client = EngineClient(pool_of(At(1)), Deadlines(1, 1))
    with pytest.raises(EngineUnavailable):
        await client.stream({"model": "tiny"})


async def test_a_silent_engine_meets_the_first_token_deadline() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    async with engine(serve, first_token_s=0.2) as (client, _):
        with pytest.raises(EngineTimeout, match="first token"):
            await read_all(client)


async def test_an_engine_that_falls_silent_meets_the_deadline_between_tokens() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + event(b'{"choices":[]}'))
        await writer.drain()
        await reader.read()

    async with engine(serve, first_token_s=0.2, between_tokens_s=0.2) as (client, _):
        with pytest.raises(EngineTimeout, match="between two tokens"):
            await read_all(client)


async def test_cancelling_closes_the_connection_at_once() -> None:
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + event(b'{"choices":[]}'))
        await reader.read()
        closed.set()

    async with engine(serve) as (client, _):
        stream = await client.stream({"model": "tiny"})
        assert await stream.frames() == [{"choices": []}]
        stream.cancel()
        assert await stream.frames() == []
        await asyncio.wait_for(closed.wait(), 1)


async def test_a_reader_that_does_not_read_stops_the_engine_from_sending() -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(HEAD)
        padding = json.dumps({"choices": [], "padding": "x" * 10_000}).encode()
        for _ in range(3000):
            writer.write(event(padding))
            await writer.drain()
            sent += 1
        writer.write(event(b"[DONE]") + b"0\r\n\r\n")
        await writer.drain()

    async with engine(serve) as (client, _):
        stream = await client.stream({"model": "tiny"})
        await asyncio.sleep(0.5)
        assert sent < 2500, "30 MB do not pile up in the gateway"
        count = 0
        while frames := await stream.frames():
            count += len(frames)
        assert count == 3000


async def test_a_body_that_is_nested_too_deeply_is_the_clients_mistake() -> None:
    client = EngineClient(pool_of(At(1)), Deadlines(first_token_s=5.0, between_tokens_s=5.0))
    with pytest.raises(RequestError, match="nested too deeply"):
        await client.stream({"model": "tiny", "structured_outputs": {"json": json.loads("[" * 400 + "]" * 400)}})
