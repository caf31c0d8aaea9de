"""Load on an OpenAI-compatible chat endpoint over raw asyncio, and what the server's process spent on it.

Every `data: {` that arrives is counted. Connections are kept alive, as the SDK's are: one for each stream or caller.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass
class Endpoint:
    """Where to send requests; `pid` is the server's process, whose children count with it, or None for nobody's."""

    port: int
    model: str
    pid: int | None = None
    key: str = "bench"
    path: str = "/v1/chat/completions"


@dataclass
class Measured:
    """What one lane gave in one round."""

    requests: int = 0
    failed: int = 0
    failure: str = ""
    frames: int = 0
    seconds: float = 0.0
    cpu_us: float = 0.0
    first_frame_ms: list[float] = field(default_factory=list)

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.first_frame_ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


async def run_streams(endpoint: Endpoint, streams: int, frames: int, gap_ms: int, for_s: float) -> Measured:
    """`streams` connections at once, each asking for `frames` frames, one every `gap_ms`, again until `for_s` are over."""
    return await _run(endpoint, {"stream": True, "max_tokens": frames, "seed": gap_ms}, streams, for_s)


async def run_unary(endpoint: Endpoint, callers: int, for_s: float) -> Measured:
    """`callers` connections at once, each asking for a reply of 16 tokens, again until `for_s` are over."""
    return await _run(endpoint, {"max_tokens": 16}, callers, for_s)


async def run_prompt(endpoint: Endpoint, prompt: list[int], streams: int, tokens: int, for_s: float) -> Measured:
    """`streams` connections at once, each asking for `tokens` tokens after a prompt of ids, again until `for_s` are over."""
    body = {"prompt": prompt, "stream": True, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.7}
    return await _run(endpoint, body, streams, for_s)


async def _run(endpoint: Endpoint, body: dict[str, object], connections: int, for_s: float) -> Measured:
    measured = Measured()
    asked = {} if "prompt" in body else {"messages": [{"role": "user", "content": "Say something."}]}
    raw = json.dumps({"model": endpoint.model, **asked, **body}).encode()
    head = (
        f"POST {endpoint.path} HTTP/1.1\r\nhost: 127.0.0.1:{endpoint.port}\r\nauthorization: Bearer {endpoint.key}\r\n"
    )
    head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    cpu_before_us, started = cpu_us(endpoint.pid), time.perf_counter()
    callers = [_caller(endpoint, head.encode() + raw, started + for_s, measured) for _ in range(connections)]
    await asyncio.gather(*callers)
    measured.seconds = time.perf_counter() - started
    measured.cpu_us = cpu_us(endpoint.pid) - cpu_before_us
    return measured


async def _caller(endpoint: Endpoint, request: bytes, until: float, measured: Measured) -> None:
    writer: asyncio.StreamWriter | None = None
    while time.perf_counter() < until:
        measured.requests += 1
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port, limit=1 << 20)
            sent = time.perf_counter()
            writer.write(request)
            async with asyncio.timeout(60):
                await _read_reply(reader, sent, measured)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            measured.failed += 1
            measured.failure = f"{type(error).__name__}: {error}"
            if writer:
                writer.close()
            writer = None
            await asyncio.sleep(0.01)
    if writer:
        writer.close()


async def _read_reply(reader: asyncio.StreamReader, sent: float, measured: Measured) -> None:
    """Read one reply to its end, counting its frames; ValueError when it is not a good one."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b" 200 " not in head[:16]:
        raise ValueError(head.decode("latin-1"))
    if b"content-length:" in head:
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        measured.first_frame_ms.append((time.perf_counter() - sent) * 1000)
        return
    tail = b""
    first = True
    done = False
    while not tail.endswith(END_OF_CHUNKS):
        data = await reader.read(65536)
        if not data:
            raise ValueError("closed before the end of the reply")
        # A frame's start may be split over two reads; neither side of the seam holds a whole one of 7 bytes.
        found = data.count(b"data: {") + (tail[-6:] + data[:6]).count(b"data: {")
        if found and first:
            first = False
            measured.first_frame_ms.append((time.perf_counter() - sent) * 1000)
        measured.frames += found
        done = done or b"[DONE]" in tail + data
        tail = (tail + data)[-12:]
    if not done:
        raise ValueError("no [DONE]")


def cpu_us(pid: int | None) -> float:
    """CPU time that `pid`, its threads and its children have used."""
    total_s = 0.0
    for process in family(pid) if pid else []:
        try:
            total_s += time.clock_gettime((~process << 3) | 2)  # the kernel's number for that process's CPU clock
        except OSError:
            continue  # ended between the listing and the reading
    return total_s * 1e6


def resident_mb(pid: int) -> float:
    """Resident memory of `pid` and its children."""
    pages = 0
    for process in family(pid):
        try:
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def family(pid: int) -> list[int]:
    """`pid` and every process that descends from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found
