"""`make bench-llama`: tokens/s and time to the first token, ours beside llama-server and llama-cpp-python's server.

    python -m tests.bench.llama_worker [--quick] [--shape 200m|1b] [--streams 1 4 8 16] [--adapters 0 1 4] [--rounds 5]

Every row is sent to every server in turn, round after round, and each figure is the median of the rounds: a noisy minute hits
all of them. All servers get the same model file, threads, sequences, context and flash-attention setting. With `--record
FILE` rounds add up over several runs, for machines that are quiet only now and then. The exit code says whether all
rows hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.bench.llama_worker import cold, models, record
from tests.bench.llama_worker.build import PeerUnavailable
from tests.bench.llama_worker.rows import PREFIX, REPLY, SUFFIX, Measured, Row, check_reply, rows, run
from tests.bench.llama_worker.servers import (
    SPARE_POSITIONS,
    LlamaCppPython,
    LlamaServer,
    Ours,
    Server,
    Setting,
    load_average,
    shown,
)

Results = dict[Row, dict[str, list[Measured]]]
AGAINST_PYTHON_STREAMS = 8  # llama-cpp-python's server answers one at a time: it is asked at this width only


def main() -> int:
    """Runs the rounds and prints the table; 0 when every row holds."""
    options = _parse()
    shape = models.SHAPES[options.shape]
    setting = Setting(
        model=options.model or models.model(options.shape),
        adapters=models.adapters(options.shape, max(1, *options.adapters)),
        context=PREFIX + SUFFIX + REPLY + SPARE_POSITIONS,
        sequences=max(options.streams),
        threads=options.threads,
        flash_attention=options.flash_attention,
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers, missing = _start(setting, Path(folder), options.peers, stack)
        print(f"{options.shape}, {len(os.sched_getaffinity(0))} cores, load average {load_average():.1f}")
        print(shown(servers))
        wrong = [reason for server in servers if (reason := check_reply(server, shape.vocab_size))]
        if wrong:
            sys.exit("; ".join(wrong))
        table, done = rows(options.streams, options.adapters), record.read(options.record)
        results, python_cost = _measure(servers, table, done, options, shape.vocab_size)
        start = cold.measure(setting, Path(folder) / "cold", options.registered, options.rounds, shape.vocab_size)
    text, verdict, holds = _report(results, missing)
    print(text, python_cost, start, verdict, sep="\n")
    return 0 if holds and start.holds else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 8 streams, base and 4 adapters, one round")
    parser.add_argument("--shape", choices=models.SHAPES, default="200m")
    parser.add_argument("--model", type=Path, help="another GGUF of that shape's vocabulary and adapters")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 4], help="0 is the base")
    parser.add_argument("--registered", type=int, default=1000, help="adapters, for the cold start")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path, help="JSON lines to which rounds are added and from which they count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--flash-attention", action="store_true", help="on for all servers; off is the worker's default"
    )
    parser.add_argument("--peers", nargs="*", default=["llama-server", "llama-cpp-python"], help="fewer of them")
    options = parser.parse_args()
    if options.quick:
        options.streams, options.adapters, options.rounds, options.registered = [1, 8], [0, 4], 1, 40
    return options


def _start(setting: Setting, folder: Path, peers: list[str], stack: ExitStack) -> tuple[list[Server], dict[str, str]]:
    servers: list[Server] = [stack.enter_context(Ours(setting, folder))]
    missing = {}
    for kind in (LlamaServer, LlamaCppPython):
        if kind.name in peers:
            try:
                servers.append(stack.enter_context(kind(setting, folder)))
            except PeerUnavailable as reason:
                missing[kind.name] = str(reason)
    return servers, missing


def _measure(
    servers: list[Server], table: list[Row], done: list[record.Entry], options: argparse.Namespace, vocab_size: int
) -> tuple[Results, str]:
    ours = next(server for server in servers if isinstance(server, Ours))
    results: Results = {row: {} for row in table}
    for row, name, measured in done:
        if row in results:
            results[row].setdefault(name, []).append(measured)
    first = max((len(runs) for by_name in results.values() for runs in by_name.values()), default=0)  # seeds are fresh
    rounds = options.rounds
    runs = [(row, server) for row in table for server in servers if _asked(row, server)]
    for server in servers:  # the first request pays for pages that were never touched
        asyncio.run(run(server, Row(1, 0, "none"), -1, vocab_size))
    before = ours.python_cost()
    columns = (TextColumn("{task.description:48}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=rounds * len(runs))
        for round_number in range(rounds):
            for row, server in runs:
                progress.update(task, description=f"{row.title}: {server.name}")
                measured = asyncio.run(run(server, row, first + round_number, vocab_size))
                results[row].setdefault(server.name, []).append(measured)
                record.add(options.record, (row, server.name, measured))
                progress.advance(task)
    after = ours.python_cost()
    loop_s, http_s, steps = (new - old for new, old in zip(after, before, strict=True))
    cost = f"Python a decode step: {1e6 * loop_s / steps:.0f} µs CPU in the loop, {1e6 * http_s / steps:.0f} µs in HTTP"
    return results, cost


def _asked(row: Row, server: Server) -> bool:
    return server.takes_adapters or (row.adapters == 0 and row.streams == AGAINST_PYTHON_STREAMS)


def _report(results: Results, missing: dict[str, str]) -> tuple[str, str, bool]:
    names = list(dict.fromkeys(name for measured in results.values() for name in measured))
    lines = [
        f"{'':44}" + "".join(f"{name:>26}" for name in names),
        f"{'':44}" + f"{'tok/s':>16}{'TTFT ms':>10}" * len(names),
    ]
    failed, held = [], 0
    for row, measured in results.items():
        line = f"{row.title:44}"
        for name in names:
            runs = measured.get(name)
            line += f"{_median(runs):16.0f}{1e3 * _first(runs):10.0f}" if runs else f"{'·':>16}{'·':>10}"
        for name, factor in _asked_factors(row, measured).items():
            ratio = _median(measured[Ours.name]) / _median(measured[name])
            line += f"   {ratio:.2f}×{'' if ratio >= factor else f' < {factor:g}'}"
            held += ratio >= factor
            if ratio < factor:
                failed.append(f"{row.title} ({ratio:.2f}× {name}, asked {factor:g}×)")
        lines.append(line)
    counts = {len(runs) for measured in results.values() for runs in measured.values()}
    lines.append(f"medians of {min(counts)} rounds" if len(counts) == 1 else f"medians of {sorted(counts)} rounds")
    lines += [f"{name} was not measured: {reason}" for name, reason in missing.items()]
    verdict = f"{held} comparisons hold, {len(failed)} do not" + (": " + "; ".join(failed) if failed else "")
    return "\n".join(lines), verdict, not failed and not missing


def _asked_factors(row: Row, measured: dict[str, list[Measured]]) -> dict[str, float]:
    """How many times a peer's tokens/s ours must be."""
    factors = {}
    if LlamaServer.name in measured:
        # A prefix is shared by the streams of one adapter: two of eight where there are four, so less can be saved.
        factors[LlamaServer.name] = 2.0 if row.prefix == "cold" and row.streams == 8 and row.adapters < 2 else 1.0
    if LlamaCppPython.name in measured:
        factors[LlamaCppPython.name] = 4.0
    return factors


def _median(runs: list[Measured]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def _first(runs: list[Measured]) -> float:
    return statistics.median(run.first_token_s for run in runs)


if __name__ == "__main__":
    sys.exit(main())
