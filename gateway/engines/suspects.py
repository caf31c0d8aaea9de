"""Adapters that may have killed the worker: who was being loaded when it died, and how often.

Its rule: one that was being loaded, or verified for the first time, at MOST_DEATHS deaths of a worker is brought to none any
more. Kept in the engine's folder, so that a gateway that starts anew knows it too; another version of ours begins afresh, since
its llama.cpp may be another. Runs on the gateway's loop; the file is written on a thread.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import gateway
from gateway.engines.adapters import AdapterRejected

MOST_DEATHS = 2


class Suspects:
    """What the file says: `loading` is [adapter, pid] while one is brought to a worker, `deaths` counts by adapter."""

    def __init__(self, file: Path | None) -> None:
        """None: of an engine whose process others watch; it has no pid here, so nobody is suspected."""
        self._file = file
        self._loading: tuple[str, int] | None = None
        self._deaths: dict[str, int] = {}
        self._read = False

    async def enter(self, adapter: str, pid: int | None) -> None:
        """Call before an adapter is brought to the worker `pid`. AdapterRejected when too many have died of it."""
        if not self._read and self._file is not None:
            self._read = True
            self._take(await asyncio.to_thread(_read, self._file))
        if self._loading is not None and self._loading[1] != pid:  # that worker is no more
            died_of = self._loading[0]
            self._deaths[died_of] = self._deaths.get(died_of, 0) + 1
        self._loading = None
        if self._deaths.get(adapter, 0) >= MOST_DEATHS:
            await self._write()
            raise AdapterRejected(
                f"the worker died {self._deaths[adapter]} times while {adapter} was being loaded, so it is not loaded again; "
                f"worker.log says how it ended. Remove {self._file} to have it tried again."
            )
        if pid is not None:
            self._loading = adapter, pid
            await self._write()

    async def leave(self, adapter: str, served: bool) -> None:
        """Call when the worker has outlived it."""
        known = self._deaths.pop(adapter, None) if served else None
        if known is not None or (self._loading is not None and self._loading[0] == adapter):
            self._loading = None
            await self._write()

    async def _write(self) -> None:
        if self._file is None:
            return
        told = {"tunegate": gateway.__version__, "loading": self._loading, "deaths": self._deaths}
        await asyncio.to_thread(_replace, self._file, json.dumps(told))

    def _take(self, told: Any) -> None:
        match told:
            case {"tunegate": gateway.__version__, "loading": loading, "deaths": dict(deaths)}:
                self._deaths = {name: count for name, count in deaths.items() if type(count) is int}
                match loading:
                    case [str(adapter), int(pid)]:
                        self._loading = adapter, pid


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}")  # no fsync: what a power cut takes is counted again
    beside.write_text(text)
    os.replace(beside, file)
