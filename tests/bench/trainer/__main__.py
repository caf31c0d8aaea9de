"""The trainer beside plain TRL, and a job's phases through a real gateway, with a trainer standing by and without.

    make bench-trainer      python -m tests.bench.trainer [--rounds 3] [--examples 200] [--threads N] [--quick]

Rounds are interleaved and medians shown. The last line says which goals hold, the exit code whether all do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.trainer.against_trl import KINDS, Figures, in_a_process, prepare, write_demo_job
from tests.bench.trainer.phases import Phases, measure
from tests.server import Server

STANDBY = {"warm": "always", "cold": "never"}
PHASE_EXAMPLES = 60


@dataclass(frozen=True)
class Goal:
    name: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def __str__(self) -> str:
        return f"{self.name} {self.found:.2f} ({'≥' if self.at_least else '≤'} {self.bound:g})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="one round, fewer examples: under two minutes")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.examples = 1, 80
    with tempfile.TemporaryDirectory() as folder:
        goals = compare_with_trl(Path(folder), options) + time_phases(Path(folder), options.rounds)
    held, missed = [str(goal) for goal in goals if goal.holds], [str(goal) for goal in goals if not goal.holds]
    print(f"holds: {'; '.join(held) or 'none'}. Does not hold: {'; '.join(missed) or 'none'}.")
    return 1 if missed else 0


def compare_with_trl(folder: Path, options: argparse.Namespace) -> list[Goal]:
    base = prepare(folder / "demo")
    rounds: dict[str, list[tuple[Figures, float]]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds):
        for kind in KINDS:
            job = write_demo_job(folder / f"{number}-{kind}", base, options.examples, options.threads)
            rounds[kind].append(in_a_process(kind, job))
    table = Table(title=f"an epoch of {options.examples} examples, {_circumstances(options.rounds, options.threads)}")
    for name in ("", "tokens/s", "CPU s / 1000 tokens", "peak MB", "process → first step, s"):
        table.add_column(name, justify="right")
    rows = {
        kind: [
            [figures.tokens_per_s, figures.cpu_s_per_1000_tokens, figures.peak_mb, first_step_s]
            for figures, first_step_s in found
        ]
        for kind, found in rounds.items()
    }
    for kind, found in rows.items():
        table.add_row(kind, *(f"{statistics.median(column):.4g}" for column in zip(*found, strict=True)))
    ours, theirs = (rows[kind] for kind in KINDS)
    ratios = [
        statistics.median(a / b for a, b in zip(mine, other, strict=True))
        for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)
    return [Goal("tokens/s of plain TRL's ×", ratios[0], 1.3, at_least=True)]


def time_phases(folder: Path, rounds: int) -> list[Goal]:
    found: dict[str, list[Phases]] = {name: [] for name in STANDBY}
    with ExitStack() as stack:
        servers = {}
        for name, standby in STANDBY.items():
            servers[name] = Server(folder / name, f'[jobs]\nstandby = "{standby}"\n').start()
            stack.callback(servers[name].stop)
        for _ in range(rounds):
            for name, server in servers.items():
                found[name].append(measure(server, PHASE_EXAMPLES))
    table = Table(title=f"a job of {PHASE_EXAMPLES} examples in batches of 4, s, {_circumstances(rounds)}")
    for column in ("", "created → first step", "last step → answer", "created → answer"):
        table.add_column(column, justify="right")
    medians = {name: _median(phases) for name, phases in found.items()}
    for name, phases in medians.items():
        seconds = (phases.created_to_first_step, phases.last_step_to_answer, phases.created_to_answer)
        table.add_row(name, *(f"{second:.2f}" for second in seconds))
    Console().print(table)
    warm, cold = medians["warm"], medians["cold"]
    last_step = max(warm.last_step_to_answer, cold.last_step_to_answer)
    return [
        Goal("created → first step, warm, s", warm.created_to_first_step, 1.0),
        Goal("created → first step, cold, s", cold.created_to_first_step, 6.0),
        Goal("last step → answer, s", last_step, 1.0),
    ]


def _median(phases: list[Phases]) -> Phases:
    columns = zip(*((p.created_to_first_step, p.last_step_to_answer, p.created_to_answer) for p in phases), strict=True)
    return Phases(*map(statistics.median, columns))


def _circumstances(rounds: int, threads: int | None = None) -> str:
    said = "" if threads is None else f"{threads} threads, "
    return f"{said}medians of {rounds}, load {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    sys.exit(main())
