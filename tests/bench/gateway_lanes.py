"""What the gateway costs: Tunegate beside vllm-router, LiteLLM and the direct line, in one run on one machine.

    python -m tests.bench.gateway_lanes [--rounds 3] [--only tunegate,vllm-router] [--json FILE]

The gateway under test is pinned to one core; the mock engine and the load share another. Rounds are interleaved (every
contender, then every contender again) and each figure is the median of the rounds, so that a noisy minute hits all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from tests.bench import peers
from tests.bench.load import Endpoint, Measured, resident_mb, run_streams, run_unary

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("direct", "tunegate", "tunegate-4", "vllm-router", "litellm")
REPLICAS = 4
STREAMS, FRAMES, GAP_MS = 32, 64, 20
CALLERS = 16
SATURATED_STREAMS, SATURATED_FRAMES = 16, 256


@dataclass
class Contender:
    """A server in the run, with its figures: one list a row of the table, one entry a round."""

    name: str
    endpoint: Endpoint
    figures: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, row: str, value: float) -> None:
        self.figures.setdefault(row, []).append(value)

    def median(self, row: str) -> float | None:
        values = self.figures.get(row)
        return statistics.median(values) if values else None


ROWS = {
    "cpu_us_frame": f"{STREAMS} streams × {FRAMES} frames @ {GAP_MS} ms: gateway CPU, µs a frame",
    "ttft_p50": "… first frame, p50 ms (direct), added ms (others)",
    "ttft_p99": "… first frame, p99 ms (direct), added ms (others)",
    "single_p50": f"1 stream × {FRAMES} @ {GAP_MS} ms: first frame, p50 ms, added ms",
    "unary_rps": f"unary, {CALLERS} at once: requests/s",
    "unary_cpu_us": "… gateway CPU, µs a request",
    "saturated_fps": f"saturated, {SATURATED_STREAMS} × {SATURATED_FRAMES} frames: frames/s",
    "saturated_cpu_us": "… gateway CPU, µs a frame",
    "rss_mb": "resident memory after, MB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(NAMES), help="contenders, of: " + ", ".join(NAMES))
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    arguments = parser.parse_args()
    wanted = [name for name in NAMES if name in {*arguments.only.split(","), "direct"}]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("this needs two cores: one for the gateway, one for engine and load")
    with (
        tempfile.TemporaryDirectory() as scratch,
        Run(Path(scratch), gateway_core=cores[0], load_core=cores[-1]) as run,
    ):
        contenders, missing = run.start(wanted)
        uvloop.run(measure(contenders, arguments.rounds))
        print(report(contenders, missing, arguments.rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps({each.name: each.figures for each in contenders}, indent=1))


class Run:
    """The processes of one run; leaving it ends them."""

    def __init__(self, scratch: Path, gateway_core: int, load_core: int) -> None:
        self.scratch, self.gateway_core = scratch, gateway_core
        self.processes: list[subprocess.Popen[bytes]] = []
        os.sched_setaffinity(0, {load_core})

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()

    def start(self, wanted: list[str]) -> tuple[list[Contender], dict[str, str]]:
        """Everything that was asked for and came up, and the reason for each that did not."""
        engine_port = free_port()
        engine = [sys.executable, "-m", "tests.bench.mock_engine", str(engine_port)]
        self._spawn("mock engine", engine, f"http://127.0.0.1:{engine_port}/health", core=None)
        starters: dict[str, Callable[[int], Endpoint]] = {
            "direct": lambda port: Endpoint(port, "mock"),
            "tunegate": self._tunegate,
            "tunegate-4": self._tunegate_replicas,
            "vllm-router": self._vllm_router,
            "litellm": self._litellm,
        }
        contenders, missing = [], {}
        for name in wanted:
            try:
                contenders.append(Contender(name, starters[name](engine_port)))
            except peers.PeerUnavailable as reason:
                missing[name] = str(reason)
        return contenders, missing

    def _tunegate(self, engine_port: int) -> Endpoint:
        return self._serve("tunegate", [engine_port])

    def _tunegate_replicas(self, engine_port: int) -> Endpoint:
        """The same in front of several replicas: what choosing one costs."""
        ports = [engine_port, *(free_port() for _ in range(REPLICAS - 1))]
        for port in ports[1:]:
            engine = [sys.executable, "-m", "tests.bench.mock_engine", str(port)]
            self._spawn(f"mock engine {port}", engine, f"http://127.0.0.1:{port}/health", core=None)
        return self._serve("tunegate-4", ports)

    def _serve(self, name: str, engine_ports: list[int]) -> Endpoint:
        port = free_port()
        config = self.scratch / f"{name}.toml"
        urls = [f"http://127.0.0.1:{engine_port}" for engine_port in engine_ports]
        config.write_text(
            f'[bases.mock]\npath = "{ROOT / "deploy" / "demo_model"}"\n'
            f'[[engines]]\nkind = "llama"\nmodel = "mock"\nurls = {urls}\nkey = "bench"\n'
        )
        command = [sys.executable, "-m", "gateway", "serve", "--port", str(port), "--config", str(config)]
        command += ["--data", str(self.scratch / f"data-{name}")]
        pid = self._spawn(name, command, f"http://127.0.0.1:{port}/readyz")
        return Endpoint(port, "mock", pid)

    def _vllm_router(self, engine_port: int) -> Endpoint:
        port = free_port()
        command = peers.vllm_router_command(peers.install_vllm_router(), port, engine_port, free_port())
        pid = self._spawn("vllm-router", command, f"http://127.0.0.1:{port}/health")
        return Endpoint(port, "mock", pid)

    def _litellm(self, engine_port: int) -> Endpoint:
        port = free_port()
        command, environment = peers.litellm_command(peers.install_litellm(), port, engine_port, self.scratch)
        pid = self._spawn("litellm", command, f"http://127.0.0.1:{port}/health/readiness", environment=environment)
        return Endpoint(port, "mock", pid)

    def _spawn(
        self,
        name: str,
        command: list[str],
        ready_url: str,
        core: int | None = -1,
        environment: dict[str, str] | None = None,
    ) -> int:
        """Start a process (on the gateway's core, unless `core` is None) and wait until it answers."""
        log = self.scratch / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        if core is not None:
            os.sched_setaffinity(process.pid, {self.gateway_core})
        self.processes.append(process)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with urllib.request.urlopen(ready_url, timeout=2):
                    return process.pid
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
        raise peers.PeerUnavailable(f"{name} did not come up: {tail[:400]}")


async def measure(contenders: list[Contender], rounds: int) -> None:
    for contender in contenders:  # the first requests of a process pay for imports and connections
        await run_streams(contender.endpoint, 4, 16, 0, for_s=0.5)
        await run_unary(contender.endpoint, 4, for_s=0.5)
    for number in range(rounds):
        for contender in contenders:
            print(f"round {number + 1} of {rounds}: {contender.name}", file=sys.stderr, flush=True)
            await measure_round(contender)


async def measure_round(contender: Contender) -> None:
    """One round of every lane."""
    endpoint = contender.endpoint
    paced = await run_streams(endpoint, STREAMS, FRAMES, GAP_MS, for_s=4)
    check(contender, "paced", paced, FRAMES)
    contender.add("cpu_us_frame", paced.cpu_us / (paced.requests * FRAMES))
    contender.add("ttft_p50", paced.percentile_ms(0.5))
    contender.add("ttft_p99", paced.percentile_ms(0.99))
    single = await run_streams(endpoint, 1, FRAMES, GAP_MS, for_s=4)
    check(contender, "single", single, FRAMES)
    contender.add("single_p50", single.percentile_ms(0.5))
    unary = await run_unary(endpoint, CALLERS, for_s=3)
    check(contender, "unary", unary, 0)
    contender.add("unary_rps", (unary.requests - unary.failed) / unary.seconds)
    contender.add("unary_cpu_us", unary.cpu_us / unary.requests)
    saturated = await run_streams(endpoint, SATURATED_STREAMS, SATURATED_FRAMES, 0, for_s=3)
    if check(contender, "saturated", saturated, SATURATED_FRAMES):
        contender.add("saturated_fps", saturated.requests * SATURATED_FRAMES / saturated.seconds)
        contender.add("saturated_cpu_us", saturated.cpu_us / (saturated.requests * SATURATED_FRAMES))
    if endpoint.pid:
        contender.add("rss_mb", resident_mb(endpoint.pid))


def check(contender: Contender, lane: str, measured: Measured, frames: int) -> bool:
    """Whether every frame came through; what did not is noted under the table."""
    if measured.failed:
        contender.notes.append(
            f"{contender.name}, {lane}: {measured.failed} of {measured.requests} requests failed, last: {measured.failure}"
        )
    elif measured.frames < measured.requests * frames:
        contender.notes.append(
            f"{contender.name}, {lane}: {measured.frames} events for {measured.requests * frames} frames of the engine"
        )
    return not measured.failed


def report(contenders: list[Contender], missing: dict[str, str], rounds: int) -> str:
    """The table, as Markdown, with what a reader must know of the machine."""
    direct = next(each for each in contenders if each.name == "direct")
    lines = [
        f"Median of {rounds} interleaved rounds; {platform.machine()}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, load average {os.getloadavg()[0]:.1f} at the end.",
        "",
        "| lane | " + " | ".join(each.name for each in contenders) + " |",
        "|---|" + "---:|" * len(contenders),
    ]
    for row, title in ROWS.items():
        cells = []
        for each in contenders:
            value = each.median(row)
            relative = row in {"ttft_p50", "ttft_p99", "single_p50"} and each is not direct
            if value is not None and relative:
                value -= direct.median(row) or 0.0
            cells.append(shown(value, signed=relative) if each.endpoint.pid or "cpu" not in row else "–")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    notes = [note for each in contenders for note in dict.fromkeys(each.notes)]
    notes += [f"{name} is not in the table: {reason}" for name, reason in missing.items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def shown(value: float | None, signed: bool) -> str:
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:+.1f}" if signed else f"{value:.1f}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
