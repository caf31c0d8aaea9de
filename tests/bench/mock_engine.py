"""An engine that costs next to nothing, so that what is measured is the gateway in front of it. A process of its own.

    python -m tests.bench.mock_engine PORT

It speaks Tunegate's engine dialect (`POST /v1/completions` with a prompt of ids answers with ids) and OpenAI's chat form, which
the peers pass on. The request decides the work in fields that every gateway hands through: `max_tokens` is the number of
frames (one token each) and `seed` the milliseconds between them. Frames are built once; the hot path is a sleep and a write.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, cast

import uvloop

MODEL = "mock"
CONTEXT_LENGTH = 32768
IDS = range(600, 632)  # ordinary pieces of any tokenizer large enough; never a control token
TEXT = " token"


def main(port: int) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    uvloop.run(serve())


class Connection(asyncio.Protocol):
    """One keep-alive connection: requests are answered one after another."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.received = b""
        self.answering: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answering:
            self.answering.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        while request := self.next_request():
            path, body = request
            if path.endswith("completions"):
                self.answering = asyncio.ensure_future(self.complete("chat" in path, json.loads(body)))
            else:
                self.reply(control_reply(path))

    def next_request(self) -> tuple[str, bytes] | None:
        """The next whole request as (path, body), or None until more bytes come."""
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            parts, closed = dechunk(rest)
            if closed is None:
                return None
            body, self.received = parts, closed
        else:
            length = int(headers.get("content-length", 0))
            if len(rest) < length:
                return None
            body, self.received = rest[:length], rest[length:]
        return lines[0].split(" ")[1].split("?")[0], body

    async def complete(self, chat: bool, request: dict[str, Any]) -> None:
        count = request.get("max_tokens") or request.get("max_completion_tokens") or 16
        gap_s = (request.get("seed") or 0) / 1000
        if not request.get("stream"):
            if gap_s:
                await asyncio.sleep(gap_s)
            self.reply(unary_body(chat, count))
            return
        self.transport.write(STREAM_HEAD)
        frames = CHAT_FRAMES if chat else ID_FRAMES
        last = LAST_CHAT_FRAME if chat else LAST_ID_FRAME
        loop = asyncio.get_running_loop()
        due = loop.time()
        for step in range(count):
            due += gap_s
            await asyncio.sleep(max(0.0, due - loop.time()))
            if self.transport.is_closing():
                return
            self.transport.write(last if step == count - 1 else frames[step % len(frames)])
        tail = b""
        if (request.get("stream_options") or {}).get("include_usage"):
            tail = event(envelope(chat, True) | {"choices": [], "usage": usage(count)})
        self.transport.write(chunk(tail + b"data: [DONE]\n\n") + b"0\r\n\r\n")

    def reply(self, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw)
        self.transport.write(head + raw)


def control_reply(path: str) -> dict[str, Any]:
    if path.endswith("/models"):
        model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "bench", "root": MODEL, "parent": None}
        return {"object": "list", "data": [model | {"max_model_len": CONTEXT_LENGTH}]}
    if path == "/version":
        facts = {"version": "bench", "kind": "mock", "base_digest": None, "mode": {}}
        return facts | {"max_model_len": CONTEXT_LENGTH, "max_num_seqs": 1024}
    return {}


def unary_body(chat: bool, count: int) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
    if chat:
        choice["message"] = {"role": "assistant", "content": TEXT * count}
    else:
        ids = [IDS[step % len(IDS)] for step in range(count)]
        choice |= {"text": "", "stop_reason": None, "token_ids": ids, "prompt_token_ids": None, "prompt_logprobs": None}
    return envelope(chat, False) | {"choices": [choice], "usage": usage(count)}


def frame(chat: bool, token_id: int, finish_reason: str | None) -> bytes:
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish_reason}
    if chat:
        choice["delta"] = {"role": "assistant", "content": TEXT}
    else:
        choice |= {"text": "", "stop_reason": None, "token_ids": [token_id]}
    return chunk(event(envelope(chat, True) | {"choices": [choice], "usage": None}))


def envelope(chat: bool, stream: bool) -> dict[str, Any]:
    if chat:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        return {"id": "chatcmpl-0123456789abcdef", "object": kind, "created": 1763680000, "model": MODEL}
    return {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1763680000, "model": MODEL}


def usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": count, "total_tokens": 8 + count}


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def dechunk(raw: bytes) -> tuple[bytes, bytes | None]:
    """A chunked body and what follows it; None for the latter while the body is incomplete."""
    body = b""
    while True:
        size_line, found, raw = raw.partition(b"\r\n")
        if not found:
            return body, None
        size = int(size_line, 16)
        if len(raw) < size + 2:
            return body, None
        body, raw = body + raw[:size], raw[size + 2 :]
        if size == 0:
            return body, raw


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
CHAT_FRAMES = [frame(True, 0, None)]
ID_FRAMES = [frame(False, token_id, None) for token_id in IDS]
LAST_CHAT_FRAME = frame(True, 0, "length")
LAST_ID_FRAME = frame(False, IDS[0], "length")


if __name__ == "__main__":
    main(int(sys.argv[1]))
