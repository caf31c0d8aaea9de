"""One GPU for serving and training: what the engines that are started here do while a job trains.

    beside      they serve on; there is memory for both
    wait        the job waits until nobody has been answered for a while, and then trains beside them
    sleep       they let the replies under way end, sleep (vLLM's level 1) and are woken when the trainer is gone; requests
                meanwhile wait, up to a bound, or go to an engine that is awake; one that gets ready meanwhile sleeps too

Its rule: the job's events say what was done and what could not be; no policy fails a job. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from gateway.engines.engine import Engine
from gateway.engines.pool import Pool
from gateway.errors import EngineError, StoreUnavailable
from gateway.store.events import Level

logger = logging.getLogger("tunegate.jobs")

Policy = Literal["beside", "wait", "sleep"]
Tell = Callable[[str, Level], Awaitable[None]]

IDLE_S = 10.0  # without a reply, before a job that waits begins
POLL_S = 0.5
WATCH_S = 1.0


class Sharing:
    """`async with sharing.training(…)` around a trainer's life. Jobs that train at once share one sleep."""

    def __init__(self, policy: Policy, pools: Callable[[], Iterable[Pool]], idle_s: float = IDLE_S) -> None:
        """`pools` are those with engines that are started here."""
        self._policy = policy
        self._pools = pools
        self._idle_s = idle_s
        self._training = 0
        self._asleep: list[Engine] = []
        self._awake: set[Engine] = set()  # that did not go to sleep, and were told of
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def training(self, tell: Tell, *ends: asyncio.Event) -> AsyncIterator[None]:
        """The GPU is as the policy has it. Any of `ends` ends the waiting; what is told becomes events of the job."""
        if self._policy == "wait":
            await self._until_idle(tell, ends)
        if self._policy != "sleep":
            yield
            return
        self._training += 1
        watching: asyncio.Task[None] | None = None
        try:
            async with self._changing:
                await self._sleep(tell)
            watching = asyncio.create_task(self._keep_asleep(tell), name="engines sleep")
            yield
        finally:  # whatever went wrong, an event that could not be written among it: nobody sleeps for a job that is over
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            self._training -= 1
            async with self._changing:
                if not self._training:
                    await self._wake(tell)

    async def _keep_asleep(self, tell: Tell) -> None:
        """Puts to sleep what was started, or started again, while the job trains."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                async with self._changing:
                    await self._sleep(tell)
            except StoreUnavailable as error:
                logger.warning("an event of a job could not be written: %s", error.message)

    async def _until_idle(self, tell: Tell, ends: Sequence[asyncio.Event]) -> None:
        told = False
        while not any(end.is_set() for end in ends):
            pools = list(self._pools())
            now = time.monotonic()
            if all(not pool.uses and now - pool.used_at >= self._idle_s for pool in pools):
                return
            if not told:
                told = True
                await tell(f"The job waits until the engines have answered nobody for {self._idle_s:g} s", "info")
            await asyncio.sleep(POLL_S)

    async def _sleep(self, tell: Tell) -> None:
        for name, engine in self._engines():
            if not engine.ready:
                continue
            if not engine.sleeps:
                await self._tell_awake(
                    engine,
                    f"The engine of '{name}' cannot sleep (only a vLLM that is started here can): it serves on",
                    tell,
                )
                continue
            began = time.monotonic()
            try:
                await engine.sleep()
            except EngineError as error:
                await self._tell_awake(
                    engine, f"The engine of '{name}' was not put to sleep, and serves on: {error.message}", tell
                )
                continue
            self._awake.discard(engine)
            if engine not in self._asleep:  # else it was started again
                self._asleep.append(engine)
            freed = ", its GPU's memory is free" if engine.frees_memory else ""
            await tell(
                f"The engine of '{name}' sleeps while the job trains{freed} ({time.monotonic() - began:.1f} s)", "info"
            )
            if not engine.frees_memory:
                await tell(
                    f"The engine of '{name}' keeps its memory in its sleep: it was started without --enable-sleep-mode, "
                    "which vLLM has on GPUs only",
                    "warn",
                )

    async def _tell_awake(self, engine: Engine, message: str, tell: Tell) -> None:
        """Once for all the times that it is tried."""
        if engine not in self._awake:
            self._awake.add(engine)
            await tell(message, "warn")

    async def _wake(self, tell: Tell) -> None:
        asleep, self._asleep = self._asleep, []
        self._awake.clear()
        told: list[tuple[str, Level]] = []
        for engine in asleep:
            name, began = engine.base.name, time.monotonic()
            try:
                await engine.wake()
            except EngineError as error:
                told.append((f"The engine of '{name}' was not woken, and is started again: {error.message}", "warn"))
            else:
                told.append((f"The engine of '{name}' is awake ({time.monotonic() - began:.1f} s)", "info"))
        for message, level in told:
            await tell(message, level)

    def _engines(self) -> list[tuple[str, Engine]]:
        """Those that are started here."""
        return [
            (pool.name, replica.engine)
            for pool in self._pools()
            for replica in pool.replicas
            if isinstance(replica.engine, Engine) and replica.engine.pid is not None
        ]
