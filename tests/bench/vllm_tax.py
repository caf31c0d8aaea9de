"""What the gateway costs a saturated vLLM: the same prompts through the gateway and straight to the same vLLM, in one run.

    python -m tests.bench.vllm_tax [--model FOLDER] [--python PYTHON] [--streams 32] [--tokens 128] [-- VLLM ARGUMENTS]

The gateway starts the vLLM itself. Both lines ask `/v1/completions` with the same ids, streamed, and every reply has all its
tokens, so tokens a second are replies times tokens; rounds are interleaved and the medians stand side by side. Asked for: at
most 2% of the tokens/s and 5 ms of the time to the first token. Where vLLM computes on the CPU, gateway and load take cores
from it, and the figure is that of the machine rather than of the gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from deploy.setup_vllm import environment_python
from gateway.settings import DEMO_MODEL_PATH
from tests.bench.load import Endpoint, Measured, run_prompt
from tests.server import Server

BASE = "base"
PROMPT_IDS = [1, *range(300, 427)]
# For the CPU build, which would otherwise bind itself to cores and take half of the memory.
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
LOST_SHARE, ADDED_MS = 0.02, 5.0


@dataclass
class Line:
    """One way to the vLLM, and what was measured on it, one value a round."""

    name: str
    endpoint: Endpoint
    tokens_per_s: list[float] = field(default_factory=list)
    saturated_ms: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL_PATH, help="a folder as on Hugging Face")
    parser.add_argument("--python", default=os.environ.get("TUNEGATE_VLLM") or environment_python())
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="of a round on one line")
    parser.add_argument("arguments", nargs="*", help="further arguments of vLLM, after --")
    asked = parser.parse_args()
    if asked.python is None:
        sys.exit("there is no vLLM: `make vllm` sets its CPU build up, or name one with --python")
    with tempfile.TemporaryDirectory() as scratch:
        server = Server(Path(scratch), settings(asked), VARIABLES)
        try:
            server.start(timeout_s=1800)
            lines = [
                Line("direct", direct(server)),
                Line("gateway", Endpoint(server.port, BASE, path="/v1/completions")),
            ]
            asyncio.run(measure(lines, asked))
        finally:
            server.stop()
    print(report(lines, asked))


def settings(asked: argparse.Namespace) -> str:
    return (
        f"[bases.{BASE}]\npath = {json.dumps(str(asked.model.absolute()))}\n"
        f"[[engines]]\nkind = 'vllm'\nmodel = '{BASE}'\npython = {json.dumps(str(asked.python))}\n"
        f"args = {json.dumps(asked.arguments)}\n"
    )


def direct(server: Server) -> Endpoint:
    """The vLLM itself, as the gateway has started it."""
    folder = server.data / "engines" / BASE
    port = json.loads((folder / "spawn.json").read_bytes())["port"]
    return Endpoint(port, BASE, key=(folder / "key").read_text(), path="/v1/completions")


async def measure(lines: list[Line], asked: argparse.Namespace) -> None:
    for line in lines:  # the first requests pay for graphs and connections
        await run_prompt(line.endpoint, PROMPT_IDS, asked.streams, asked.tokens, for_s=1)
    for number in range(asked.rounds):
        for line in lines if number % 2 else reversed(lines):
            print(f"round {number + 1} of {asked.rounds}: {line.name}", file=sys.stderr, flush=True)
            alone = await run_prompt(line.endpoint, PROMPT_IDS, 1, 8, for_s=asked.seconds / 4)
            full = await run_prompt(line.endpoint, PROMPT_IDS, asked.streams, asked.tokens, for_s=asked.seconds)
            check(line, alone, full)
            line.alone_ms.append(alone.percentile_ms(0.5))
            line.saturated_ms.append(full.percentile_ms(0.5))
            line.tokens_per_s.append((full.requests - full.failed) * asked.tokens / full.seconds)


def check(line: Line, *measured: Measured) -> None:
    for each in measured:
        if each.failed:
            sys.exit(f"{line.name}: {each.failed} of {each.requests} requests failed: {each.failure[:300]}")


def report(lines: list[Line], asked: argparse.Namespace) -> str:
    straight, through = lines
    rows = [
        f"{asked.streams} streams × {asked.tokens} tokens after a prompt of {len(PROMPT_IDS)}, {asked.model.name}; median of "
        f"{asked.rounds} interleaved rounds; {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f} at the end.",
        "",
        "| | direct | gateway | difference |",
        "|---|---:|---:|---:|",
    ]
    before, after = statistics.median(straight.tokens_per_s), statistics.median(through.tokens_per_s)
    rows.append(f"| tokens/s, saturated | {before:,.0f} | {after:,.0f} | {(after / before - 1) * 100:+.1f}% |")
    held = [after >= before * (1 - LOST_SHARE)]
    for title, name in (("first token, saturated, p50 ms", "saturated_ms"), ("… alone, p50 ms", "alone_ms")):
        before, after = (statistics.median(getattr(line, name)) for line in lines)
        rows.append(f"| {title} | {before:.1f} | {after:.1f} | {after - before:+.1f} ms |")
        held.append(after - before <= ADDED_MS)
    words = "holds" if all(held) else "does not hold here"
    return "\n".join([*rows, "", f"At most {LOST_SHARE:.0%} of the tokens/s and {ADDED_MS:g} ms: {words}."])


if __name__ == "__main__":
    main()
