"""How long each phase of a job takes, from creation to the first token of the tuned model, on a server of its own.

    python -m tests.bench.job_phases [--examples 200] [--epochs 1] [--rounds 3]

Polls every 20 ms as a client would, so each figure is that exact. Prints a row a round and the medians; asserts nothing.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from tests.e2e import training
from tests.server import Server

PHASES = ["created → queued", "→ running", "→ first step", "→ last step", "→ served", "→ first token", "total"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    table = Table(title=f"a job of {options.examples} examples, {options.epochs} epoch(s), batches of 4: seconds")
    for name in ["round", *PHASES]:
        table.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder)).start()
        try:
            rounds = [measure(server.client(), options.examples, options.epochs) for _ in range(options.rounds)]
        finally:
            server.stop()
    for number, seconds in enumerate(rounds, start=1):
        table.add_row(str(number), *(f"{second:.2f}" for second in seconds))
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    table.add_row("median", *(f"{second:.2f}" for second in medians))
    Console().print(table)


def measure(client: OpenAI, examples: int, epochs: int) -> list[float]:
    """Seconds of each of `PHASES`."""
    file_id = training.upload(client, training.examples("bench", examples))
    steps = -(-examples // 4) * epochs
    began = time.perf_counter()
    job_id = training.create(client, "tunegate-demo", file_id, n_epochs=epochs).id
    marks = [began]

    def wait(*statuses: str) -> None:
        while client.fine_tuning.jobs.retrieve(job_id).status not in {*statuses, "failed", "cancelled", "succeeded"}:
            time.sleep(0.02)
        marks.append(time.perf_counter())

    def wait_for_step(step: int) -> None:
        while True:
            events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
            if any(event.type == "metrics" and event.data["step"] >= step for event in events):  # type: ignore[index]
                break
            if client.fine_tuning.jobs.retrieve(job_id).status == "failed":
                raise SystemExit(f"the job failed: {training.messages(client, job_id)}")
            time.sleep(0.02)
        marks.append(time.perf_counter())

    wait("queued", "running")
    wait("running")
    wait_for_step(1)
    wait_for_step(steps)
    wait()
    model = client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
    if model is None:
        raise SystemExit(f"the job failed: {training.messages(client, job_id)}")
    asked = {"role": "user", "content": "What is cedar 2?"}
    next(iter(client.chat.completions.create(model=model, messages=[asked], max_tokens=4, stream=True)))  # type: ignore[call-overload]
    marks.append(time.perf_counter())
    return [later - earlier for earlier, later in itertools.pairwise(marks)] + [marks[-1] - began]


if __name__ == "__main__":
    main()
