"""An engine that runs elsewhere as a small state machine beside `WorkerProcess`: asked whether it is well, never started.

            start()              answers as it should                stop()
    STOPPED ───────▶ STARTING ─────────────────────────▶ READY ───────────────▶ STOPPED
                      ▲    │ asked again, ever more rarely  │
                      └────┘◀──── BACKOFF ◀─────────────────┘ /health failed several times in a row, or it was restarted

It may be restarted by its owner between two questions, and has forgotten its adapters then; so what it lists is looked
at too. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

from gateway.engines.client import Endpoint
from gateway.engines.control import EngineControl
from gateway.engines.process import OnUp, State, Timings, nothing_follows
from gateway.engines.suspects import Suspects
from gateway.engines.vllm_dialect import greet_vllm
from gateway.errors import EngineError

log = logging.getLogger(__name__)

Greet = Callable[[EngineControl, str, float], Awaitable[dict[str, Any]]]


class RemoteEngine:
    """What `Engine` needs of an engine that others run, from `start` to `stop`."""

    def __init__(
        self, endpoint: Endpoint, served_name: str, timings: Timings | None = None, greet: Greet = greet_vllm
    ) -> None:
        """`greet` is the handshake of its kind: what it says of itself, or an EngineError."""
        self.state = State.STOPPED
        self.reason: str | None = None
        self.restarts = 0  # how often it went away since `start`
        self.pid: int | None = None
        self.suspects = Suspects(None)
        self._endpoint, self._served_name = endpoint, served_name
        self._timings = timings or Timings()
        self._greet = greet
        self._on_up: OnUp = nothing_follows
        self._on_change: Callable[[], None] = lambda: None
        self._expected: Callable[[], set[str]] = set
        self._task: asyncio.Task[None] | None = None

    def listen(self, on_up: OnUp, on_change: Callable[[], None], expected: Callable[[], set[str]]) -> None:
        """As `WorkerProcess.listen`; `expected()` are the adapters that it must not have forgotten."""
        self._on_up, self._on_change, self._expected = on_up, on_change, expected

    async def has_worker(self) -> bool:
        return True

    def start(self) -> None:
        """Begins to ask; returns at once."""
        if self._task is None:
            self._enter(State.STARTING)
            self._task = asyncio.create_task(self._run(), name=f"engine {self._served_name} at {self._where}")

    async def stop(self, keep_process: bool = False) -> None:
        """Asks no more; the engine goes on."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self._enter(State.STOPPED)

    @property
    def _where(self) -> str:
        return f"{self._endpoint.host}:{self._endpoint.port}"

    async def _run(self) -> None:
        failures = 0
        while True:
            self._enter(State.STARTING if failures == 0 else State.BACKOFF)
            control = EngineControl(self._endpoint)
            try:
                version = await self._greet(control, self._served_name, self._timings.health_timeout_s)
                failures = 0
                await self._serve(control, version)
            except EngineError as error:
                self._tell_once(error.message)
            except Exception as error:  # the boundary to another machine: it will be asked again
                log.exception("engine %s at %s", self._served_name, self._where)
                self._tell_once(repr(error))
            finally:
                await control.close()
            failures += 1
            self._enter(State.BACKOFF)
            await asyncio.sleep(self._wait_s(failures))

    async def _serve(self, control: EngineControl, version: dict[str, Any]) -> None:
        """Stays as long as it answers; then raises EngineError with how that ended."""
        self._enter(State.READY)
        up = asyncio.ensure_future(self._on_up(self._endpoint, control, version))
        try:
            await self._watch(control)
        finally:
            self.restarts += 1
            up.cancel()
            await asyncio.wait([up])

    async def _watch(self, control: EngineControl) -> None:
        unanswered = 0
        while True:
            await asyncio.sleep(self._timings.health_interval_s)
            before = self._expected()
            try:
                await control.health(self._timings.health_timeout_s)
                names = set(await control.models())
            except EngineError as error:
                unanswered += 1
                if unanswered >= self._timings.health_failures:
                    raise EngineError(f"/health failed {unanswered} times in a row ({error.message})") from error
                continue
            unanswered = 0
            if lost := (before & self._expected()) - names:  # both: one may be loaded or dropped while it is asked
                raise EngineError(
                    f"it was restarted, it seems: it does not know {', '.join(sorted(lost)[:3])} any more"
                )

    def _wait_s(self, failures: int) -> float:
        doubled = self._timings.backoff_first_s * 2.0 ** min(failures - 1, 16)
        return min(self._timings.backoff_max_s, doubled) * random.uniform(0.8, 1.2)

    def _tell_once(self, why: str) -> None:
        if why != self.reason:
            log.error("engine %s at %s: %s", self._served_name, self._where, why)
        self.reason = why

    def _enter(self, state: State) -> None:
        if state is State.READY:
            self.reason = None
        if state is not self.state:
            self.state = state
            self._on_change()
