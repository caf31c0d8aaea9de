"""Tokens a second of the llama worker at 1, 4 and 8 streams: `python -m tests.bench.llama_worker [--model GGUF]`.

Starts a real worker (by default on a random model of a real shape), streams greedy replies over HTTP and prints, for each
number of streams, the median over the rounds. Figures of a shared machine: compare within one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.llama_worker.running import KEY, RunningWorker, prompt, request, running
from tests.tiny_gguf import Shape, write_tiny_gguf, write_tiny_lora

SHAPES = {
    "demo": Shape(hidden=256, layers=6, heads=8, kv_heads=4, feed_forward=768, vocab_size=4096, context_length=2048),
    "200m": Shape(
        hidden=1024, layers=16, heads=16, kv_heads=8, feed_forward=2816, vocab_size=32000, context_length=2048
    ),
}


@dataclass(frozen=True)
class Row:
    """One round of one number of streams."""

    tokens_per_s: float  # from the first request to the last token
    decode_tokens_per_s: float  # counting decode steps alone
    first_token_s: float  # median over the streams
    outside_s: float  # of a decode round: wall time outside llama_decode


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF; by default a random one of --shape is made")
    parser.add_argument("--shape", choices=SHAPES, default="200m")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--adapters", type=int, default=0, help="streams take turns over so many adapters (0: the base)"
    )
    parser.add_argument("--prompt", type=int, default=60, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a reply")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = options.model or write_tiny_gguf(root / "model.gguf", shape=SHAPES[options.shape])
        arguments = ["--threads", str(options.threads), "--max-seqs", str(max(options.streams)), "--ctx", "2048"]
        with running(root / "worker", model, *arguments) as worker:
            names = ["base"]
            if options.adapters:
                names = [f"adapter-{index}" for index in range(options.adapters)]
                for seed, name in enumerate(names):
                    write_tiny_lora(root / name / "adapter.gguf", SHAPES[options.shape], seed, 16, 16, 0.2)
                    worker.load(name, root / name).raise_for_status()
            print(f"{worker.client.get('/version').json()}, load average {os.getloadavg()[0]:.1f}")
            rows: dict[int, list[Row]] = {count: [] for count in options.streams}
            for _ in range(options.rounds):
                for count in options.streams:
                    rows[count].append(asyncio.run(_measure(worker, count, names, options)))
    print("streams  tokens/s  decode tokens/s  first token ms  outside llama_decode µs a round")
    for count, measured in rows.items():
        print(
            f"{count:7d}  {_median(measured, 'tokens_per_s'):8.0f}  {_median(measured, 'decode_tokens_per_s'):15.0f}  "
            f"{1e3 * _median(measured, 'first_token_s'):14.0f}  {1e6 * _median(measured, 'outside_s'):31.0f}"
        )


def _median(rows: list[Row], name: str) -> float:
    return statistics.median(getattr(row, name) for row in rows)


async def _measure(worker: RunningWorker, count: int, names: list[str], options: argparse.Namespace) -> Row:
    before = _step_times(worker)
    started = time.perf_counter()
    bodies = [
        request(
            model=names[index % len(names)],
            prompt=prompt(options.prompt, index),
            max_tokens=options.tokens,
            temperature=options.temperature,
            ignore_eos=True,
            stream=True,
        )
        for index in range(count)
    ]
    times = await asyncio.gather(*(_stream(worker.ready()["port"], body) for body in bodies))
    ended = time.perf_counter()
    after = _step_times(worker)
    decode_s, prompt_s = after.decode_s - before.decode_s, after.prompt_s - before.prompt_s
    rounds = (after.decode_steps - before.decode_steps) / min(count, len(names))
    return Row(
        tokens_per_s=count * options.tokens / (ended - started),
        decode_tokens_per_s=count * (options.tokens - 1) / decode_s,
        first_token_s=statistics.median(first - started for first, _ in times),
        outside_s=(ended - started - decode_s - prompt_s) / rounds,
    )


async def _stream(port: int, body: dict[str, object]) -> tuple[float, float]:
    """(when the first frame came, when [DONE] came). A raw socket: the client must not take the worker's cores."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {KEY}\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await reader.readuntil(b"data: ")
    first = time.perf_counter()
    await reader.readuntil(b"[DONE]")
    writer.close()
    return first, time.perf_counter()


@dataclass(frozen=True)
class StepTimes:
    """What the worker has spent in llama_decode so far."""

    prompt_s: float
    decode_s: float
    decode_steps: int


def _step_times(worker: RunningWorker) -> StepTimes:
    text = worker.client.get("/metrics").text
    lines = re.findall(r'^tunegate_worker_step_seconds_(\w+){kind="(\w+)"} (\S+)$', text, re.MULTILINE)
    values = {(kind, what): float(value) for what, kind, value in lines}
    return StepTimes(
        values.get(("prompt", "sum"), 0.0), values.get(("decode", "sum"), 0.0), int(values.get(("decode", "count"), 0))
    )


if __name__ == "__main__":
    main()
