"""A worker process as a small state machine: spawned or taken over, watched, started again, ended.

            start()                 answers                     stop()
    STOPPED ───────▶ STARTING ─────────────────▶ READY ───────────────────▶ STOPPING ──▶ STOPPED
                      ▲   │ died, too slow,       │ died, hung               ▲ (from any state)
                      │   ▼ wrong answers         ▼
                      └── BACKOFF ◀───────────────┘   1 s, 2 s, … 30 s, then every 30 s for ever

One task (`_run`) owns the state, the handle and every transition, so that there is nothing to race; `stop` cancels that
task and then does the rest itself. A death is noticed at once (pidfd), a hang by /health. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gateway.engines.client import Endpoint
from gateway.engines.control import EngineControl
from gateway.engines.handle import ProcessHandle, exit_text
from gateway.engines.spawn import HOST, Launch, WorkerFailed, WorkerFolder
from gateway.engines.suspects import Suspects
from gateway.errors import EngineError, EngineUnavailable

log = logging.getLogger(__name__)

READY_POLL_S = 0.05


class State(enum.Enum):
    STOPPED = "stopped"  # nothing runs, nothing is wanted
    STARTING = "starting"  # a process runs or is being made; it does not answer yet
    READY = "ready"  # it answers
    BACKOFF = "backoff"  # it failed; `reason` says how, and it will be tried again
    STOPPING = "stopping"  # stop() is at work


OnUp = Callable[[Endpoint, EngineControl, dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Timings:
    """Every wait of the state machine, in seconds."""

    start_timeout_s: float = 300.0  # from the fork to the first good answer
    health_interval_s: float = 2.0
    health_timeout_s: float = 5.0
    health_failures: int = 3  # in a row; then the process is taken for hung
    stop_grace_s: float = 6.0  # the worker itself drains for up to 5
    backoff_first_s: float = 1.0
    backoff_max_s: float = 30.0
    stable_after_s: float = 60.0  # ready for this long: the next failure is a first one again


class WorkerProcess:
    """One worker, kept alive from `start` to `stop`."""

    def __init__(
        self,
        launch: Launch,
        folder: WorkerFolder,
        timings: Timings | None = None,
    ) -> None:
        self.launch = launch
        self.state = State.STOPPED
        self.reason: str | None = None  # of the last failure, until it is ready again
        self.restarts = 0  # failures since `start`
        self.suspects = Suspects(folder.path / "suspects.json")
        self._folder = folder
        self._on_up: OnUp = nothing_follows
        self._on_change: Callable[[], None] = lambda: None
        self._timings = timings or Timings()
        self._handle: ProcessHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._failures_in_a_row = 0

    @property
    def pid(self) -> int | None:
        return self._handle.pid if self._handle else None

    def listen(self, on_up: OnUp, on_change: Callable[[], None], expected: Callable[[], set[str]]) -> None:
        """`on_up` runs each time that the process begins to answer, and is cancelled when it stops doing so;
        `on_change` is called after each change of `state`, and must not block. One that lives forgets no adapter, so it is
        not asked for those that are `expected`."""
        self._on_up, self._on_change = on_up, on_change

    async def has_worker(self) -> bool:
        """Whether a worker runs that an earlier gateway has left."""
        adoptable, leftovers = await asyncio.to_thread(self._folder.find_worker, self.launch)
        found = [*leftovers, *([adoptable] if adoptable else [])]
        for handle in found:
            handle.close()
        return bool(found)

    # in the order of its life

    def start(self) -> None:
        """Begins; returns at once. Idempotent while it runs."""
        if self._task is None:
            self._enter(State.STARTING)
            self._task = asyncio.create_task(self._run(), name=f"engine {self.launch.served_name}")

    async def stop(self, keep_process: bool = False) -> None:
        """Ends the worker (SIGTERM, a grace, SIGKILL) or leaves it for the next start to take over.

        Returns when it is gone: within the grace and 10 s. A second call while one is at work waits for nothing.
        """
        task, self._task = self._task, None
        if task is None:
            return
        self._enter(State.STOPPING)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        handle, self._handle = self._handle, None
        if handle is not None:
            if not keep_process:
                if not await handle.end(self._timings.stop_grace_s):
                    log.error("engine %s: process %d outlives SIGKILL", self.launch.served_name, handle.pid)
                await asyncio.to_thread(self._folder.end_orphans, handle)
            handle.close()
        self._enter(State.STOPPED)

    async def _run(self) -> None:
        adopt = True
        while True:
            self._enter(State.STARTING)
            try:
                self._handle = (await self._take_over() if adopt else None) or await self._spawn()
                endpoint, version = await self._until_it_answers(self._handle)
                await self._serve(self._handle, endpoint, version)
            except (WorkerFailed, OSError) as error:
                await self._back_off(str(error))
            except Exception as error:  # the boundary to another process: whatever it was, the base is to be served
                log.exception("engine %s", self.launch.served_name)
                await self._back_off(f"cannot be run: {error!r}")
            adopt = False

    async def _take_over(self) -> ProcessHandle | None:
        """The worker of an earlier gateway where it is the same as ours would be; ends those that are not."""
        adoptable, leftovers = await asyncio.to_thread(self._folder.find_worker, self.launch)
        for handle in leftovers:
            log.info("engine %s: ends process %d, which an earlier start left", self.launch.served_name, handle.pid)
            handle.watch()
            await handle.end(self._timings.stop_grace_s)
            await asyncio.to_thread(self._folder.end_orphans, handle)
            handle.close()
        if adoptable is not None:
            log.info("engine %s: takes over process %d", self.launch.served_name, adoptable.pid)
            adoptable.watch()
        return adoptable

    async def _spawn(self) -> ProcessHandle:
        spawning = asyncio.ensure_future(asyncio.to_thread(self._folder.spawn, self.launch))
        try:
            handle = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            self._handle = await spawning  # the fork cannot be called back: stop() ends what came of it
            self._handle.watch()
            raise
        handle.watch()
        log.info("engine %s: started process %d", self.launch.served_name, handle.pid)
        return handle

    async def _until_it_answers(self, handle: ProcessHandle) -> tuple[Endpoint, dict[str, Any]]:
        """Where it answers and what it says of itself. WorkerFailed when it dies, is too slow or is not what we want."""
        deadline = time.monotonic() + self._timings.start_timeout_s
        last = "it told no port"
        while time.monotonic() < deadline:
            port = self._folder.port_of(handle, self.launch)
            if port is not None:
                endpoint = Endpoint(HOST, port, self._folder.read_key())
                control = EngineControl(endpoint)
                try:
                    return endpoint, await self.launch.greet(control, self._timings.health_timeout_s)
                except EngineUnavailable as error:
                    last = error.message
                except EngineError as error:
                    raise WorkerFailed(f"gave a wrong answer at its start: {error.message}") from error
                finally:
                    await control.close()
            if await handle.wait(READY_POLL_S):
                raise WorkerFailed(f"{exit_text(handle.exit_code)} before it was ready")
        raise WorkerFailed(f"was not ready after {self._timings.start_timeout_s:g} s: {last}")

    async def _serve(self, handle: ProcessHandle, endpoint: Endpoint, version: dict[str, Any]) -> None:
        """Stays as long as the process answers; then raises WorkerFailed with how that ended."""
        since = time.monotonic()
        control = EngineControl(endpoint)
        self._enter(State.READY)
        up = asyncio.ensure_future(self._on_up(endpoint, control, version))
        up.add_done_callback(self._report_crash)
        try:
            raise WorkerFailed(await self._watch(handle, control))
        finally:
            if time.monotonic() - since >= self._timings.stable_after_s:
                self._failures_in_a_row = 0
            up.cancel()
            await asyncio.wait([up])
            await control.close()

    async def _watch(self, handle: ProcessHandle, control: EngineControl) -> str:
        unanswered = 0
        while True:
            if await handle.wait(self._timings.health_interval_s):
                return exit_text(handle.exit_code)
            try:
                await control.health(self._timings.health_timeout_s)
            except EngineError as error:
                unanswered += 1
                log.warning("engine %s: %s", self.launch.served_name, error.message)
                if unanswered >= self._timings.health_failures and not handle.exited:
                    return f"is taken for hung: /health failed {unanswered} times in a row ({error.message})"
            else:
                unanswered = 0

    async def _back_off(self, how: str) -> None:
        """Puts away what is left of the process, says why, and waits."""
        self._failures_in_a_row += 1
        times = f", {self._failures_in_a_row} times in a row" if self._failures_in_a_row > 1 else ""
        self.reason = f"the worker {how}{times}"
        self._enter(State.BACKOFF)  # before anything is awaited: it takes no request from here on
        if tail := await asyncio.to_thread(self._folder.log_tail):
            self.reason += f"; its log ends: {tail}"
        self.restarts += 1
        pid, delay_s = self.pid, self._backoff_s()
        log.error(
            "engine %s (process %s): %s; next start in %.1f s", self.launch.served_name, pid, self.reason, delay_s
        )
        if self._handle is not None:
            if not await self._handle.kill():  # it failed: it gets no grace
                log.error("engine %s: process %s outlives SIGKILL", self.launch.served_name, pid)
            await asyncio.to_thread(self._folder.end_orphans, self._handle)
            self._handle.close()
            self._handle = None
        await asyncio.sleep(delay_s)

    def _backoff_s(self) -> float:
        doubled = self._timings.backoff_first_s * 2.0 ** min(self._failures_in_a_row - 1, 16)
        return min(self._timings.backoff_max_s, doubled) * random.uniform(0.8, 1.2)  # many engines, one machine

    def _enter(self, state: State) -> None:
        if state is State.READY:
            self.reason = None
        if state is not self.state:
            self.state = state
            self._on_change()

    def _report_crash(self, up: asyncio.Future[None]) -> None:
        if not up.cancelled() and (error := up.exception()) is not None:
            log.error("engine %s: what should follow its start failed", self.launch.served_name, exc_info=error)


async def nothing_follows(endpoint: Endpoint, control: EngineControl, version: dict[str, Any]) -> None:
    pass
