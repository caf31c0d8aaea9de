"""What listing costs in a large store: `python -m tests.bench.listing`. 10,000 jobs and 100,000 events beside 100 of each.

Each list is read as its route reads it (`store/…` inside `Store.read`), the first page, one in the middle and the last; in
both stores, so that growth is seen and not the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import Connection, insert

from gateway.store import Store, tables
from gateway.store.events import select_events
from gateway.store.jobs import select_jobs

LIMIT = 20
Read = Callable[[Connection, str | None], Any]


def main() -> None:
    """Fills two stores, measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        small = asyncio.run(_measure(Path(folder) / "small.db", 100, 100, rounds))
        large = asyncio.run(_measure(Path(folder) / "large.db", 10_000, 100_000, rounds))
    table = Table(title=f"A page of {LIMIT}, medians of {rounds} in ms", title_justify="left")
    for name in ("list", "page", "100 of each", "10,000 jobs, 100,000 events", "ratio"):
        table.add_column(name, justify="left" if name in ("list", "page") else "right")
    for (what, page), before in small.items():
        after = large[what, page]
        table.add_row(what, page, f"{before:.2f}", f"{after:.2f}", f"{after / before:.2f}")
    Console(width=120).print(table)


async def _measure(path: Path, n_jobs: int, n_events: int, rounds: int) -> dict[tuple[str, str], float]:
    store = Store.open(path)
    try:
        await store.write(lambda connection: _fill(connection, n_jobs, n_events))
        reads: dict[str, tuple[Read, Callable[[int], str], int]] = {
            "jobs": (lambda c, after: select_jobs(c, limit=LIMIT, after=after), "ftjob-{}".format, n_jobs),
            "a job's events": (
                lambda c, after: select_events(c, "ftjob-0", limit=LIMIT, after=after),
                "ftevent-{}".format,
                n_events // 2,
            ),
        }
        found = {}
        for what, (read, name, count) in reads.items():
            # Newest first: the last page begins behind the oldest but LIMIT.
            for page, after in (("first", None), ("middle", name(count // 2)), ("last", name(LIMIT))):
                found[what, page] = await _time(store, read, after, rounds)
        return found
    finally:
        store.close()


async def _time(store: Store, read: Read, after: str | None, rounds: int) -> float:
    took = []
    for _ in range(rounds):
        began = time.perf_counter()
        page = await store.read(lambda connection: read(connection, after))
        took.append((time.perf_counter() - began) * 1000)
        assert len(page.items) == LIMIT
    return statistics.median(took)


def _fill(connection: Connection, n_jobs: int, n_events: int) -> None:
    """Half of the events are the first job's, the others spread over all."""
    connection.execute(
        insert(tables.jobs),
        [
            {
                "id": f"ftjob-{n}",
                "created_at": 1_760_000_000 + n // 3,
                "model": "m",
                "base": "m",
                "training_file": "file-x",
                "seed": n,
                "hyperparameters": {"n_epochs": 3},
                "status": "succeeded",
                "metadata": {"n": str(n)},
            }
            for n in range(n_jobs)
        ],
    )
    connection.execute(
        insert(tables.events),
        [
            {
                "id": f"ftevent-{n}",
                "job_id": "ftjob-0" if n < n_events // 2 else f"ftjob-{n % n_jobs}",
                "created_at": 1_760_000_000 + n // 3,
                "level": "info",
                "type": "metrics",
                "message": f"Step {n}: training loss=0.12",
                "data": {"step": n, "train_loss": 0.12},
            }
            for n in range(n_events)
        ],
    )


if __name__ == "__main__":
    main()
