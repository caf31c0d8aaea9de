"""Adapters that are brought to the engines when they are first asked for: a job's checkpoints, most of which never are.

Its rule: who asks first has it loaded and verified, and all who ask meanwhile wait for the same load; whoever leaves ends
nobody else's. What the witness refuses is told to whoever asks, and tried again after a while. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from gateway.engines.adapters import Adapter, AdapterRejected
from gateway.errors import EngineUnavailable, ModelNotFound, RequestError

log = logging.getLogger(__name__)

WAIT_S = 120.0  # of one request, for the load
REFUSED_S = 60.0  # before an adapter that was refused is tried again


class NotServable(RequestError):
    """An adapter that engines refuse, or do not reproduce as it was trained."""

    code = "model_not_servable"


class FirstUse:
    """`offer` what may be asked for, `await bring(name)` before a request for it; `withdraw` and `stop` end it."""

    def __init__(self, load: Callable[[Adapter], Awaitable[object]]) -> None:
        """`load` returns when an engine serves the adapter; it raises AdapterRejected or EngineError."""
        self._load = load
        self._offered: dict[str, Adapter] = {}  # by engine name, until it is loaded
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, tuple[float, AdapterRejected]] = {}

    def __contains__(self, engine_name: str) -> bool:
        """Whether it is to be brought first."""
        return engine_name in self._offered

    def offer(self, adapters: Iterable[Adapter]) -> None:
        for adapter in adapters:
            self._offered[adapter.engine_name] = adapter

    def withdraw(self, engine_name: str) -> None:
        """It is not to be had any more; who waits for it is told that there is no such model."""
        self._offered.pop(engine_name, None)
        self._refused.pop(engine_name, None)
        if (loading := self._loading.pop(engine_name, None)) is not None:
            loading.cancel()

    async def bring(self, engine_name: str) -> None:
        """Returns when it is served. Raises NotServable, ModelNotFound when it was withdrawn, EngineUnavailable."""
        public_name = engine_name.rpartition("@")[0]
        adapter = self._offered.get(engine_name)
        if adapter is None:  # another request has brought it
            return
        refused_at, refusal = self._refused.get(engine_name, (0.0, None))
        if refusal is not None and time.monotonic() - refused_at < REFUSED_S:
            raise NotServable(f"The model '{public_name}' cannot be served: {refusal.message}", param="model")
        loading = self._loading.get(engine_name)
        if loading is None:
            loading = asyncio.create_task(self._bring(adapter), name=f"first use of {engine_name}")
            self._loading[engine_name] = loading
        await asyncio.wait({loading}, timeout=WAIT_S)
        if not loading.done():
            raise EngineUnavailable(f"'{public_name}' is still being loaded", retry_after_s=5)
        if loading.cancelled():
            raise ModelNotFound(public_name)
        error = loading.exception()
        if isinstance(error, AdapterRejected):
            raise NotServable(f"The model '{public_name}' cannot be served: {error.message}", param="model")
        if error is not None:
            raise error

    async def stop(self) -> None:
        """Ends the loads that are under way."""
        tasks = list(self._loading.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring(self, adapter: Adapter) -> None:
        name = adapter.engine_name
        began = time.monotonic()
        try:
            await self._load(adapter)
        except AdapterRejected as error:
            self._refused[name] = (time.monotonic(), error)
            log.error("%s is not servable: %s", name, error.message)
            raise
        else:
            if self._offered.get(name) is adapter:
                del self._offered[name]
            log.info("%s: loaded and verified at its first use, in %.2f s", name, time.monotonic() - began)
        finally:
            if self._loading.get(name) is asyncio.current_task():
                del self._loading[name]
