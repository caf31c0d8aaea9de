"""What one row of the table asks, and what one run of it measured."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

from tests.bench.llama_worker.servers import Ask, Server, encode

PLAIN_PROMPT, PREFIX, SUFFIX, REPLY = 60, 500, 50, 64
TIMEOUT_S = 300


@dataclass(frozen=True)
class Row:
    """`streams` requests at once, over so many adapters (0: the base); with a prefix that all share, or without."""

    streams: int
    adapters: int
    prefix: str  # "none"; "cold": never seen before; "warm": as in the run before, with other suffixes

    @property
    def title(self) -> str:
        who = "base" if not self.adapters else f"{self.adapters} adapter{'s' if self.adapters > 1 else ''}"
        what = {"none": "60", "cold": "500 shared + 50, cold", "warm": "500 shared + 50, warm"}[self.prefix]
        return f"{self.streams:2d} streams, {who}, prompt {what}"


@dataclass(frozen=True)
class Measured:
    """One run of a row on one server."""

    tokens_per_s: float  # from the first request to the last token
    first_token_s: float  # median over the streams


def rows(streams: list[int], adapters: list[int]) -> list[Row]:
    """The table's rows; each warm one comes right after its cold one, whose prefix it repeats."""
    return [
        Row(count, number, prefix)
        for number in adapters
        for prefix in ("none", "cold", "warm")
        for count in streams
        if number <= max(1, count)
    ]


def asks(row: Row, seed: int, vocab_size: int) -> list[Ask]:
    """The requests of one run: the same for every server; `seed` gives fresh prompts."""
    own = random.Random(f"{seed}-{row}")
    prefix = random.Random(f"{seed}-{row.streams}-{row.adapters}-prefix")
    shared = [] if row.prefix == "none" else [prefix.randrange(300, vocab_size) for _ in range(PREFIX)]
    length = PLAIN_PROMPT if row.prefix == "none" else SUFFIX
    return [
        Ask(
            [1, *shared[1:], *(own.randrange(300, vocab_size) for _ in range(length))],
            index % row.adapters if row.adapters else None,
            REPLY,
        )
        for index in range(row.streams)
    ]


async def run(server: Server, row: Row, seed: int, vocab_size: int) -> Measured:
    """Sends the row's requests at once and waits for the last token."""
    bodies = [encode(server, ask) for ask in asks(row, seed, vocab_size)]
    started = time.perf_counter()
    times = await asyncio.wait_for(asyncio.gather(*(stream(server, body) for body in bodies)), TIMEOUT_S)
    ended = max(last for _, last in times)
    first = statistics.median(first for first, _ in times)
    return Measured(row.streams * REPLY / (ended - started), first - started)


async def stream(server: Server, request: bytes) -> tuple[float, float]:
    """(when the first frame came, when the last one came). A raw socket: the client must not take the server's cores."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(f"{server.name} answered {head!r} {await reader.read(2000)!r}")
    await reader.readuntil(server.first)
    first = time.perf_counter()
    body = b""
    while server.ended not in body:
        part = await reader.read(1 << 16)
        if not part:
            raise RuntimeError(f"{server.name} closed the stream early: …{body[-300:]!r}")
        body = body[-64:] + part
    last = time.perf_counter()
    writer.close()
    return first, last


def check_reply(server: Server, vocab_size: int) -> str | None:
    """What is wrong with a reply of `server`, if anything: it must have as many tokens as asked."""
    ask = asks(Row(1, 0, "none"), -2, vocab_size)[0]  # not a prompt of the rounds: they must be cold
    frames = asyncio.run(_frames(server, encode(server, ask)))
    last = json.loads(frames[-1])
    counted = last.get("tokens_predicted", len(frames))
    enough = counted == REPLY or last.get("choices", [{}])[0].get("finish_reason") == "length"
    return None if enough else f"{server.name} generated {counted} tokens of {REPLY}: {frames[-1][:300]!r}"


async def _frames(server: Server, request: bytes) -> list[bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    body = await asyncio.wait_for(reader.read(-1), TIMEOUT_S)
    writer.close()
    return [
        line.removeprefix(b"data: ").strip()
        for line in body.splitlines()
        if line.startswith(b"data: {") and b'"usage"' not in line
    ]
