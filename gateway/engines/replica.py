"""One of several servers that answer for a model, and what the gateway has seen of it: the client writes, the router reads.

Its rule: every request that begins ends here, once, and is counted by how it went. Plain numbers, so that the hot path pays
nothing for them; `routing_metrics` shows them. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gateway.engines.adapters import Adapter
from gateway.engines.breaker import Breaker
from gateway.engines.client import Endpoint
from gateway.engines.router import REASONS, Why, seed_of
from gateway.engines.witness import WitnessReport

log = logging.getLogger(__name__)

FAULTS = ("connect", "lost", "timeout", "refused")


class Member:
    """A server, by the name that the operator knows it by, in logs and metrics."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seed = seed_of(name)
        self.breaker = Breaker()
        self.in_flight = 0
        self.chosen: dict[Why, int] = dict.fromkeys(REASONS, 0)
        self.faults = dict.fromkeys(FAULTS, 0)
        self.busy = 0  # requests that it turned away
        self.retried = 0  # requests that went on to another

    def begin(self, model: str) -> None:
        """A request is its from here to `end`."""
        self.in_flight += 1
        self.breaker.begin()

    def answered(self) -> None:
        """It began to answer."""
        self.breaker.succeed()

    def turned_away(self) -> None:
        """It is busy, which is no fault."""
        self.busy += 1
        self.breaker.succeed()

    def failed(self, how: str) -> None:
        """A request came to nothing, or broke off, by its fault: one of FAULTS."""
        self.faults[how] += 1
        was_closed = self.breaker.closed
        self.breaker.fail(time.monotonic())
        if was_closed and not self.breaker.closed:
            log.warning("replica %s: failed %d times in a row; it rests", self.name, self.breaker.failures)

    def end(self, model: str) -> None:
        """Once for each `begin`."""
        self.in_flight -= 1
        self.breaker.forget()


class ReplicaEngine(Protocol):
    """What a pool needs of an engine; `Engine` is one."""

    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def ready(self) -> bool: ...
    @property
    def started(self) -> bool: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def version(self) -> dict[str, Any]: ...
    @property
    def takes_adapters(self) -> bool: ...
    @property
    def max_lora_rank(self) -> int | None: ...
    @property
    def adapters(self) -> Mapping[str, Any]: ...
    def serves(self, engine_name: str) -> bool: ...
    def take(self, model: str | None = ...) -> None: ...
    def release(self, model: str | None = ...) -> None: ...
    def set_desired(self, adapters: Iterable[Adapter]) -> None: ...
    async def start(self) -> None: ...
    async def wait_ready(self, timeout_s: float) -> None: ...
    async def stop(self) -> None: ...
    async def has_worker(self) -> bool: ...
    async def ensure_adapter(
        self, adapter: Adapter, witness: bool = ..., timeout_s: float = ...
    ) -> WitnessReport | None: ...
    async def drop_adapter(self, engine_name: str) -> None: ...


class Replica(Member):
    """One engine of a pool."""

    def __init__(
        self, name: str, engine: ReplicaEngine, served_name: str | None = None, *, has_place: bool = False
    ) -> None:
        """`name` is the operator's word for it, in logs and metrics; `served_name` what it calls the base, if otherwise.

        One that `has_place` is started here, where no second one of its name can be.
        """
        super().__init__(name)
        self.engine = engine
        self.served_name = served_name
        self.has_place = has_place
        self.leaving = False
        self.idle: list[Any] = []  # the client's connections that wait for the next request
        self._drained = asyncio.Event()

    @property
    def endpoint(self) -> Endpoint:
        """Where it answers now. EngineUnavailable while it does not."""
        return self.engine.endpoint

    def begin(self, model: str) -> None:
        """A request for a model is its from here to `end`: an adapter is not unloaded before."""
        super().begin(model)
        self.engine.take(model)

    def end(self, model: str) -> None:
        super().end(model)
        self.engine.release(model)
        if self.leaving and not self.in_flight:
            self._drained.set()

    @property
    def verified_adapters(self) -> int:
        """How many tuned models it serves."""
        return sum(map(self.engine.serves, list(self.engine.adapters)))  # copied: metrics are read on another thread

    def cut_off(self) -> None:
        """Ends `drain` now, whatever runs."""
        self._drained.set()

    async def drain(self, timeout_s: float) -> bool:
        """It takes no new request; whether those that run were over in time."""
        self.leaving = True
        if self.in_flight:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
        while self.idle:
            self.idle.pop().abort()
        return not self.in_flight
