"""A gateway's export runner in a process of its own, to be killed: `python -m tests.killed_export DATA BASE ADAPTER`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from gateway.access import ANYBODY
from gateway.export_plan import ExportPlan
from gateway.exports import Exports
from gateway.store.blobs import Blobs
from gateway.store.database import Store


async def main(data: Path, base: Path, adapter: Path) -> None:
    exports = Exports(Store.open(data / "tunegate.db"), Blobs(data / "blobs"), data / "exports")
    await exports.open()
    file = await exports.begin(ANYBODY, ExportPlan("tuned", base, adapter, "hf", "f32"), 3600)
    while not list((data / "exports" / file.id).glob(".writing-*")):  # noqa: ASYNC110 - another process writes it
        await asyncio.sleep(0.01)
    print(file.id, flush=True)
    await asyncio.sleep(600)


if __name__ == "__main__":
    asyncio.run(main(*map(Path, sys.argv[1:4])))
