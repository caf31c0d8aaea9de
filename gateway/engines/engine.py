"""One replica that serves a base: a worker that is started here or an engine elsewhere, and the adapters wanted on it.

Its rule: desired against loaded. Whatever is desired is loaded and verified after every start before the engine counts
as ready; what is loaded and not desired is unloaded. An adapter that fails is marked unservable and the others go on.
Loading happens under one lock; forgetting needs none, since a name is never used again. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gateway.bases import PreparedBase
from gateway.engines.adapters import Adapter, AdapterRejected
from gateway.engines.client import Endpoint
from gateway.engines.control import EngineControl
from gateway.engines.process import OnUp, State
from gateway.engines.suspects import Suspects
from gateway.engines.witness import Tolerances, WitnessReport, verify
from gateway.errors import EngineError, EngineUnavailable

log = logging.getLogger(__name__)

RETRY_S = 1.0
RECHECK_ITEMS = 2  # of a witness after a restart: the full one was passed when the adapter was published
ENSURE_TIMEOUT_S = 300.0
DRAIN_TIMEOUT_S = 600.0  # how long an adapter that was dropped waits for its replies
NO_ADAPTERS = (
    "the engine takes no adapters while it runs: start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
)


class Standing(enum.Enum):
    """Where a desired adapter stands on this engine."""

    PENDING = "pending"  # not loaded and verified since the engine's last start
    SERVED = "served"
    UNSERVABLE = "unservable"  # the engine or the witness refused it; tried again after the next start


@dataclass
class AdapterStatus:
    adapter: Adapter
    standing: Standing = Standing.PENDING
    report: WitnessReport | None = None
    error: AdapterRejected | None = None


class Replica(Protocol):
    """What stands behind an engine: `WorkerProcess` (started and kept alive here) or `RemoteEngine` (only asked)."""

    @property
    def state(self) -> State: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def pid(self) -> int | None: ...
    @property
    def restarts(self) -> int: ...
    @property
    def suspects(self) -> Suspects: ...
    def listen(self, on_up: OnUp, on_change: Callable[[], None], expected: Callable[[], set[str]]) -> None: ...
    async def has_worker(self) -> bool: ...
    def start(self) -> None: ...
    async def stop(self, keep_process: bool = False) -> None: ...


class Engine:
    """One base, served. `set_desired`, `await start()`, `await wait_ready()`; at the end `await stop()`.

    `kinds` makes them.
    """

    def __init__(
        self,
        base: PreparedBase,
        replica: Replica,
        *,
        context: int | None = None,
        served_name: str | None = None,
        max_lora_rank: int | None = None,
        path_map: Mapping[str, str] | None = None,
        shared: bool = False,
        tolerances: Tolerances | None = None,
    ) -> None:
        """`path_map` says where the engine finds our folders (ours → its own); of one that is `shared` with others,
        adapters that we do not know are left alone."""
        self.base = base
        self.max_model_len = min(context or base.context_length, base.context_length)
        self.served_name = served_name or base.name  # the base's name at the engine
        self.max_lora_rank = max_lora_rank  # None: no limit of its own
        self.version: dict[str, Any] = {}  # what the worker says of itself
        self._path_map = dict(path_map or {})
        self._shared = shared
        self._tolerances = tolerances or Tolerances()
        self._status: dict[str, AdapterStatus] = {}  # by engine name; its keys are what is desired
        self._endpoint: Endpoint | None = None
        self._control: EngineControl | None = None
        self._ready = asyncio.Event()
        self._lock = asyncio.Lock()
        self._asleep = False
        self._listeners: list[Callable[[Engine], None]] = []
        self._bring: Callable[[], Awaitable[None]] | None = None
        self.uses = 0  # requests and loads that are under way
        self.used_at = time.monotonic()  # when the last of them ended
        self._replies: Counter[str] = Counter()  # under way, by adapter
        self._drained: dict[str, asyncio.Event] = {}  # set when the last reply of an adapter that was dropped is over
        self._process = replica
        self._process.listen(self._on_up, self._on_process_change, self._expected)

    # what others see

    @property
    def ready(self) -> bool:
        """Whether it answers and every desired adapter is verified (or known to be unservable)."""
        return self._ready.is_set()

    @property
    def started(self) -> bool:
        """Whether its worker runs or is to run: from `start` until `stop` has ended it."""
        return self._process.state is not State.STOPPED

    @property
    def resting(self) -> bool:
        """Whether it is not there because nobody wants it: the next who does brings it."""
        return self._bring is not None and not self.started

    @property
    def state(self) -> str:
        """stopped, starting, reconciling (answers; adapters are being loaded), ready, asleep, backoff or stopping."""
        if self._asleep:
            return "asleep"
        if self._process.state is State.READY and not self.ready:
            return "reconciling"
        return self._process.state.value

    @property
    def reason(self) -> str | None:
        """Why it is not ready, where that is known."""
        return self._process.reason

    @property
    def endpoint(self) -> Endpoint:
        """Where requests go. EngineUnavailable while it is not ready."""
        if self._endpoint is None or not self.ready:
            raise self._unavailable()
        return self._endpoint

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def restarts(self) -> int:
        return self._process.restarts

    @property
    def takes_adapters(self) -> bool:
        """Whether adapters can be brought to it; True as long as it has not said otherwise."""
        return self.version.get("adapters") is not False

    @property
    def sleeps(self) -> bool:
        """Whether it can be put to sleep: a vLLM that was started here."""
        return bool(self.version.get("sleeps"))

    @property
    def frees_memory(self) -> bool:
        """Whether it gives memory back when it sleeps."""
        return bool(self.version.get("frees_memory"))

    @property
    def adapters(self) -> dict[str, AdapterStatus]:
        """The desired adapters by engine name, and how each stands. Not to be changed."""
        return self._status

    def serves(self, engine_name: str) -> bool:
        """Whether a request may be sent for this adapter now."""
        status = self._status.get(engine_name)
        return self.ready and status is not None and status.standing is Standing.SERVED

    def on_change(self, listener: Callable[[Engine], None]) -> None:
        """Calls `listener(engine)` after every change of state or of an adapter's standing. It must not block."""
        self._listeners.append(listener)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when it is ready; EngineUnavailable, with what holds it up, when it is not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise self._unavailable() from None

    # of one that is there only while it is wanted

    def on_wanted(self, bring: Callable[[], Awaitable[None]]) -> None:
        """`bring()` is awaited by whoever wants it while it is not ready; it starts it, or raises EngineUnavailable."""
        self._bring = bring

    async def hold(self, model: str | None = None) -> None:
        """It is ready, or was never to be started by who uses it; it stays until `release`. Raises EngineUnavailable.

        `model` is the adapter's engine name that is asked for: it is not unloaded before the same is released.
        """
        self.take(model)
        if self._bring is not None and not self.ready:
            try:
                await self._bring()
            except BaseException:
                self.release(model)
                raise

    def take(self, model: str | None = None) -> None:
        """As `hold`, of one that is there."""
        self.uses += 1
        if model is not None:
            self._replies[model] += 1

    def release(self, model: str | None = None) -> None:
        """Ends what `hold` or `take` with the same `model` began."""
        self.uses -= 1
        self.used_at = time.monotonic()
        if model is not None:
            self._replies[model] -= 1
            if self._replies[model] <= 0:
                del self._replies[model]
                if (drained := self._drained.pop(model, None)) is not None:
                    drained.set()

    async def has_worker(self) -> bool:
        """Whether a worker runs that an earlier gateway has left."""
        return await self._process.has_worker()

    # in the order of its life

    def set_desired(self, adapters: Iterable[Adapter]) -> None:
        """The adapters that the database knows for this base; before `start`."""
        self._status = {adapter.engine_name: AdapterStatus(adapter) for adapter in adapters}

    async def start(self) -> None:
        """Begins to spawn or take over the worker; returns at once (see `wait_ready`)."""
        self._process.start()

    async def ensure_adapter(
        self, adapter: Adapter, witness: bool = True, timeout_s: float = ENSURE_TIMEOUT_S
    ) -> WitnessReport | None:
        """Makes the adapter served, and desired from now on; returns the whole witness's report (None without one).

        AdapterRejected (WitnessMismatch among it) when it must not be served here: then it is desired no more. Outlives
        a restart of the worker; EngineUnavailable when the time is up.
        """
        await self.hold()
        try:
            return await self._ensure(adapter, witness, timeout_s)
        finally:
            self.release()

    async def _ensure(self, adapter: Adapter, witness: bool, timeout_s: float) -> WitnessReport | None:
        was_desired = adapter.engine_name in self._status
        status = self._status.setdefault(adapter.engine_name, AdapterStatus(adapter))
        served = False
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._ready.wait()
                    try:
                        async with self._lock:
                            if (control := self._control) is None:
                                continue
                            await self._make_servable(control, status, await control.models(), None, witness)
                        break
                    except AdapterRejected:
                        raise
                    except EngineError as error:  # the worker went away or was too busy: its next start may do
                        log.warning("engine %s: %s: %s", self.base.name, adapter.engine_name, error.message)
                        await asyncio.sleep(RETRY_S)
            if self._status.get(adapter.engine_name) is not status:
                raise AdapterRejected(f"{adapter.engine_name} was dropped while it was being loaded")
            served = True
        except TimeoutError:
            raise self._unavailable(f"could not load {adapter.engine_name} within {timeout_s:g} s") from None
        finally:
            if not served and not was_desired and self._status.get(adapter.engine_name) is status:
                del self._status[adapter.engine_name]
                self._tell()
        return status.report

    async def drop_adapter(self, engine_name: str) -> None:
        """Desires it no more; takes no new request for it at once and unloads it once its replies are over."""
        if self._status.pop(engine_name, None) is not None:
            self._tell()
        if self._replies[engine_name]:
            drained = self._drained.setdefault(engine_name, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(drained.wait(), DRAIN_TIMEOUT_S)
        if (control := self._control) is not None and engine_name not in self._status:  # else it is desired again
            await self._unload(control, engine_name)

    async def sleep(self) -> None:
        """Takes no request until `wake`; once the replies under way are over, it gives its GPU's memory back.

        EngineUnavailable while it is not ready, EngineError when it cannot: then it goes on as before.
        """
        if self._control is None or not self.ready:
            raise self._unavailable()
        self._asleep = True
        self._ready.clear()
        self._tell()
        try:
            await self._control.sleep()
        except BaseException:
            await self.wake()
            raise

    async def wake(self) -> None:
        """Ends its sleep. One that was restarted meanwhile is awake already; one that does not wake is restarted.

        EngineError when it did not wake.
        """
        control = self._control
        if self._asleep and control is not None:
            try:
                await control.wake_up()
            except EngineError:
                if self._control is control:  # it answers /health all the same, so nobody else would end its sleep
                    await self._process.stop()
                    self._process.start()
                raise
            if self._control is control:
                self._ready.set()
        self._asleep = False
        self._tell()

    async def stop(self, keep_process: bool = False) -> None:
        """Ends the worker, or leaves it to the next gateway. Returns when it is gone."""
        await self._process.stop(keep_process)

    # called by the process

    async def _on_up(self, endpoint: Endpoint, control: EngineControl, version: dict[str, Any]) -> None:
        self.version = version
        if type(longest := version.get("max_model_len")) is int and longest > 0:
            self.max_model_len = longest
        self._endpoint, self._control, self._asleep = endpoint, control, False
        for status in self._status.values():
            status.standing = Standing.PENDING
        while True:
            try:
                async with self._lock:
                    if version.get("sleeps") and await control.is_sleeping():
                        await control.wake_up()  # whoever put it to sleep was killed
                    await self._reconcile(control)
                    self._ready.set()
                break
            except (EngineError, OSError) as error:  # the engine, or a full disk here
                log.warning("engine %s: reconciling failed, tried again: %s", self.base.name, error)
                await asyncio.sleep(RETRY_S)
        self._tell()

    def _on_process_change(self) -> None:
        if self._process.state is not State.READY:
            self._ready.clear()
            self._asleep = False
            self._endpoint = self._control = None
        self._tell()

    async def _reconcile(self, control: EngineControl) -> None:
        began = time.monotonic()
        loaded = await control.models()
        strangers = [name for name, parent in loaded.items() if parent is not None and name not in self._status]
        for name in [] if self._shared else strangers:
            await self._unload(control, name)
        for status in list(self._status.values()):
            try:
                await self._make_servable(control, status, loaded, RECHECK_ITEMS, True)
            except AdapterRejected as error:
                log.error(
                    "engine %s: %s is not servable: %s", self.base.name, status.adapter.engine_name, error.message
                )
        if self._status:
            seconds = time.monotonic() - began
            log.info("engine %s: %d adapters reconciled in %.2f s", self.base.name, len(self._status), seconds)

    async def _make_servable(
        self,
        control: EngineControl,
        status: AdapterStatus,
        loaded: dict[str, str | None],
        max_items: int | None,
        witness: bool,
    ) -> None:
        """Loads (unless a taken-over worker has it already: a name never changes its meaning) and verifies."""
        adapter, suspects = status.adapter, self._process.suspects
        try:
            if not self.takes_adapters:
                raise AdapterRejected(NO_ADAPTERS)
            if adapter.engine_name not in loaded:
                await suspects.enter(adapter.engine_name, self.pid)
                await control.load_adapter(adapter.engine_name, self._path_there(adapter.path))
            if witness:
                status.report = await verify(control, adapter, self.served_name, self._tolerances, max_items)
        except AdapterRejected as error:
            status.standing, status.error = Standing.UNSERVABLE, error
            await suspects.leave(adapter.engine_name, served=False)
            await self._unload(control, adapter.engine_name)
            self._tell()
            raise
        await suspects.leave(adapter.engine_name, served=True)
        if self._status.get(adapter.engine_name) is not status:  # dropped meanwhile
            await self._unload(control, adapter.engine_name)
        else:
            status.standing, status.error = Standing.SERVED, None
        self._tell()

    async def _unload(self, control: EngineControl, name: str) -> None:
        try:
            await control.unload_adapter(name)
        except (EngineError, AdapterRejected) as error:  # it is not asked for any more; its memory is all that it costs
            log.warning("engine %s: %s was not unloaded: %s", self.base.name, name, error.message)

    def _path_there(self, path: Path) -> str:
        """A folder of ours as the engine finds it: the longest mapping that fits."""
        fitting = [ours for ours in self._path_map if path.is_relative_to(ours)]
        if not fitting:
            return str(path)
        ours = max(fitting, key=len)
        return str(Path(self._path_map[ours]) / path.relative_to(ours))

    def _expected(self) -> set[str]:
        """What it must know while it is the same as before."""
        return {name for name, status in self._status.items() if self.ready and status.standing is Standing.SERVED}

    def _unavailable(self, what: str = "is not ready") -> EngineUnavailable:
        why = f": {self.reason}" if self.reason else ""
        return EngineUnavailable(f"the engine of {self.base.name} {what} ({self.state}){why}", retry_after_s=2)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self)
