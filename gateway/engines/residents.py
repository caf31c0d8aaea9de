"""Which engines are in memory: some always, others from the first request for them until they have been idle for a while.

Its rule: an engine is stopped only while nobody uses it, and nobody who uses one has to know. A request holds its engine
from before it is started to the end of its reply (`EngineClient`), a publication while it loads an adapter
(`Pool.ensure_adapter`). Where there is a memory budget, whoever has been idle longest makes room; when nobody is idle,
the request is told to come back. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from gateway.engines.pool import Pool
from gateway.errors import EngineUnavailable

log = logging.getLogger(__name__)

TICK_S = 1.0
RETRY_AFTER_S = 5


@dataclass
class Resident:
    """The engine of a base, all its replicas together, and how long it stays."""

    engine: Pool
    memory_bytes: int  # what it is expected to take
    on_demand: bool
    idle_unload_s: float | None


class Residents:
    """All engines that are spawned here. `add` each, `start`; at the end `stop`."""

    def __init__(self, memory_bytes: int | None = None, start_wait_s: float = 120.0) -> None:
        self._budget = memory_bytes
        self._start_wait_s = start_wait_s
        self._residents: dict[str, Resident] = {}
        self._moving = asyncio.Lock()  # one engine at a time is started or stopped: room is made for one
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to unload what is idle."""
        self._task = asyncio.create_task(self._unload_idle(), name="unload idle engines")

    async def stop(self) -> None:
        """Stops every engine."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await asyncio.gather(*(resident.engine.stop() for resident in self._residents.values()))

    async def add(self, resident: Resident) -> None:
        """Takes an engine in; one that is always there is started, and one whose worker an earlier gateway left running."""
        engine = resident.engine
        self._residents[engine.name] = resident
        if resident.on_demand:
            engine.on_wanted(lambda: self._bring(resident))
            if not await engine.has_worker():
                return
        elif self._budget is not None and self._used_bytes() + resident.memory_bytes > self._budget:
            log.warning(
                "engine %s: with it the engines that are always there take some %d bytes, over engine_memory_bytes = %d",
                engine.name,
                self._used_bytes() + resident.memory_bytes,
                self._budget,
            )
        await engine.start()

    async def remove(self, name: str) -> None:
        """Stops an engine for good."""
        resident = self._residents.pop(name, None)
        if resident is not None:
            await _whole(resident.engine.stop())

    def resize(self, name: str, memory_bytes: int) -> None:
        """An engine has more or fewer replicas than it had."""
        if (resident := self._residents.get(name)) is not None:
            resident.memory_bytes = memory_bytes

    def is_on_demand(self, name: str) -> bool:
        resident = self._residents.get(name)
        return resident is not None and resident.on_demand

    def engine(self, name: str) -> Pool | None:
        resident = self._residents.get(name)
        return None if resident is None else resident.engine

    def engines(self) -> list[Pool]:
        return [resident.engine for resident in self._residents.values()]

    async def _bring(self, resident: Resident) -> None:
        """Returns when the engine, which the caller holds, is ready. EngineUnavailable when that takes too long."""
        engine = resident.engine
        until = time.monotonic() + self._start_wait_s
        try:
            async with asyncio.timeout(self._start_wait_s):
                async with self._moving:
                    if not engine.started:
                        await self._make_room(resident)
                        log.info("engine %s: started, it is asked for", engine.name)
                        await engine.start()
        except TimeoutError:
            raise EngineUnavailable(
                f"'{engine.name}' could not be started within {self._start_wait_s:g} s; others were being started",
                retry_after_s=RETRY_AFTER_S,
            ) from None
        await engine.wait_ready(max(0.0, until - time.monotonic()))

    async def _make_room(self, wanted: Resident) -> None:
        """Stops idle engines, the one that was used longest ago first, until `wanted` fits. Raises EngineUnavailable."""
        if self._budget is None:
            return
        name, needed = wanted.engine.name, wanted.memory_bytes
        idle = [one for one in self._residents.values() if one.on_demand and one.engine.started and not one.engine.uses]
        idle.sort(key=lambda one: one.engine.used_at)
        if self._used_bytes() + needed - sum(one.memory_bytes for one in idle) > self._budget:
            raise EngineUnavailable(
                f"'{name}' needs some {needed} bytes of memory and {self._used_bytes()} of {self._budget} "
                f"(engine_memory_bytes under [limits]) are in use by models that are busy or always there; try again shortly",
                retry_after_s=RETRY_AFTER_S,
            )
        for one in idle:
            if self._used_bytes() + needed <= self._budget:
                return
            if one.engine.uses:  # since the one before it was stopped
                continue
            log.info("engine %s: stopped, to make room for %s", one.engine.name, name)
            await _whole(one.engine.stop())
        if self._used_bytes() + needed > self._budget:
            raise EngineUnavailable(
                f"'{name}' needs some {needed} bytes of memory; those that were idle are asked for again",
                retry_after_s=RETRY_AFTER_S,
            )

    def _used_bytes(self) -> int:
        return sum(one.memory_bytes for one in self._residents.values() if one.engine.started)

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            async with self._moving:
                for resident in list(self._residents.values()):
                    engine, limit_s = resident.engine, resident.idle_unload_s
                    if not (resident.on_demand and engine.started and limit_s is not None) or engine.uses:
                        continue
                    if time.monotonic() - engine.used_at >= limit_s:
                        log.info("engine %s: stopped after %g s without a request", engine.name, limit_s)
                        await _whole(engine.stop())


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work` to its end. Who is cancelled meanwhile (a job is, or its time is up) is so only then: no engine is left
    half stopped."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
