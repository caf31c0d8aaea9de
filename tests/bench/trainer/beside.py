"""What serving and training cost one another on the same processors, by the trainer's niceness and threads.

    python -m tests.bench.trainer.beside [--seconds 6]

One stream from the demo model through a gateway, alone and while `python -m trainer` is at work; and the trainer's steps. The
choice of `gateway/jobs/priority.py` is read off it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from gateway.jobdir import Hyperparameters, JobDir, read_events
from tests.bench.trainer.against_trl import prepare, write_demo_job
from tests.server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    arrangements = [(cores, 0), (cores, 10), (cores, 19), (max(1, cores // 2), 0), (max(1, cores // 2), 10)]
    table = Table(title=f"{cores} processors, load {os.getloadavg()[0]:.1f}")
    for name in ("trainer", "decoded tokens/s", "steps/s beside it", "steps/s alone"):
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(Path(folder) / "demo")
        server = Server(Path(folder) / "server").start()
        try:
            client = server.client()
            decode(client, 2)
            table.add_row("none", f"{decode(client, options.seconds):.0f}")
            for number, (threads, niceness) in enumerate(arrangements):
                job = write_demo_job(Path(folder) / str(number), base, 200, threads)
                job.write_spec(replace(job.read_spec(), hyperparameters=Hyperparameters(50, 8, 1.0)))
                row = measure(client, job, niceness, options.seconds)
                table.add_row(f"{threads} threads, nice {niceness}", *(f"{figure:.1f}" for figure in row))
        finally:
            server.stop()
    Console().print(table)


def measure(client: OpenAI, job: JobDir, niceness: int, seconds: float) -> tuple[float, float, float]:
    command = ["nice", "-n", str(niceness), sys.executable, "-m", "trainer", str(job.path)]
    trainer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while steps(job) < 3:
            if trainer.poll() is not None:
                raise SystemExit("the trainer ended")
            time.sleep(0.05)
        before = steps(job)
        time.sleep(seconds)
        alone = (steps(job) - before) / seconds
        before, began = steps(job), time.perf_counter()
        tokens_per_s = decode(client, seconds)
        return tokens_per_s, (steps(job) - before) / (time.perf_counter() - began), alone
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()


def steps(job: JobDir) -> int:
    return sum(event.type == "metrics" for event, _ in read_events(job.events_path(1)))


def decode(client: OpenAI, seconds: float) -> float:
    """Tokens/s of one greedy stream after the other."""
    began, tokens = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        reply = client.completions.create(
            model="tunegate-demo", prompt="Once upon a time", max_tokens=64, temperature=1.0, seed=tokens
        )
        assert reply.usage is not None
        tokens += reply.usage.completion_tokens
    return tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
