"""The engines of one base, its replicas: one `Engine` each, asked for as if they were one.

Its rule: a replica is sent what it can answer and nothing else. It is ready, it has verified the adapter itself, it is not
leaving; which of those it is says `router`. What is desired is the pool's: a new adapter is there once one replica has it, and
each of the others gets it as soon as it can. Replicas come and go while requests run: one that leaves takes no new request
and is stopped when its last one is over. Runs on the gateway's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

from gateway.engines.adapters import MAX_RANK, Adapter, AdapterRejected
from gateway.engines.first_use import FirstUse
from gateway.engines.replica import Replica
from gateway.engines.router import choose, prompt_of
from gateway.engines.witness import WitnessReport
from gateway.errors import EngineError, EngineUnavailable

log = logging.getLogger(__name__)

ENSURE_TIMEOUT_S = 300.0
RETRY_S = 1.0
ASLEEP_WAITING = 256  # requests that wait while all replicas sleep
ASLEEP_WAIT_S = 120.0
ASLEEP_RETRY_S = 30
CHANGE_POLL_S = 0.1
DRAIN_S = 600.0  # the longest that a replica that leaves waits for its last reply
FOREVER = 10 * 365 * 86400.0


class Pool:
    """One base, served. `set_desired`, `await start()`, `await wait_ready()`; at the end `await stop()`."""

    def __init__(self, name: str, replicas: Iterable[Replica] = ()) -> None:
        """`name` is the base's, as requests to the engines have it."""
        self.name = name
        self.replicas: tuple[Replica, ...] = tuple(replicas)
        self.leavers: list[Replica] = []  # that answer their last requests
        self.uses = 0  # requests and loads that are under way
        self.used_at = time.monotonic()  # when the last of them ended
        self.first_use = FirstUse(self.ensure_adapter)  # adapters that are there, and loaded when they are asked for
        self._desired: dict[str, Adapter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.Task[None]] = set()  # of leavers; among the tasks
        self._bring: Callable[[], Awaitable[None]] | None = None
        self._started = False
        self._waiting = 0  # requests, for it to wake

    # which replica

    def choose(self, body: dict[str, Any], but_not: Replica | None = None) -> Replica:
        """The replica for a request's body. EngineUnavailable when there is none that can answer it now."""
        model = body["model"]
        adapter = None if model == self.name else model
        able = [
            replica
            for replica in self.replicas
            if replica.engine.ready and replica is not but_not and (adapter is None or replica.engine.serves(adapter))
        ]
        if not able:
            raise self._unavailable()
        replica, why = choose(able, adapter, prompt_of(body), time.monotonic())
        replica.chosen[why] += 1
        return replica

    # what others see

    @property
    def ready(self) -> bool:
        """Whether one replica at least can be asked."""
        return any(replica.engine.ready for replica in self.replicas)

    @property
    def started(self) -> bool:
        """Whether its workers run or are to run: from `start` until `stop` has ended them."""
        return self._started

    @property
    def resting(self) -> bool:
        """Whether it is not there because nobody wants it: the next who does brings it."""
        return self._bring is not None and not self._started

    @property
    def version(self) -> dict[str, Any]:
        """What a replica says of itself, a ready one where there is one; all are of one kind."""
        told: dict[str, Any] = {}
        for replica in self.replicas:
            if replica.engine.ready and replica.engine.version:
                return replica.engine.version
            told = told or replica.engine.version
        return told

    @property
    def takes_adapters(self) -> bool:
        """Whether tuned models can be brought to it."""
        return any(replica.engine.takes_adapters for replica in self.replicas)

    @property
    def max_lora_rank(self) -> int:
        """The highest rank that every replica takes."""
        limits = [replica.engine.max_lora_rank for replica in self.replicas]
        return min((limit for limit in limits if limit is not None), default=MAX_RANK)

    def serves(self, engine_name: str) -> bool:
        """Whether a replica can be asked for this adapter now."""
        return any(replica.engine.ready and replica.engine.serves(engine_name) for replica in self.replicas)

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when a replica is ready; EngineUnavailable, with what holds them up, when none is in time."""
        waiting = [asyncio.ensure_future(replica.engine.wait_ready(timeout_s)) for replica in self.replicas]
        try:
            for done in asyncio.as_completed(waiting):
                with contextlib.suppress(EngineUnavailable):
                    await done
                    return
            raise self._unavailable(why=True)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    # of one that sleeps while a job trains

    @property
    def asleep(self) -> bool:
        """Whether a replica sleeps."""
        return any(replica.engine.state == "asleep" for replica in self.replicas)

    async def _until_awake(self) -> None:
        """Waits with few enough others for one that can be asked. EngineUnavailable."""
        if self._waiting >= ASLEEP_WAITING:
            raise EngineUnavailable(
                f"'{self.name}' sleeps while a job trains, and {self._waiting} requests wait for it already",
                retry_after_s=ASLEEP_RETRY_S,
            )
        self._waiting += 1
        until = time.monotonic() + ASLEEP_WAIT_S
        try:
            while self.asleep and not self.ready:
                if time.monotonic() > until:
                    raise EngineUnavailable(f"'{self.name}' sleeps while a job trains", retry_after_s=ASLEEP_RETRY_S)
                await asyncio.sleep(CHANGE_POLL_S)
        finally:
            self._waiting -= 1

    # of one that is there only while it is wanted

    def on_wanted(self, bring: Callable[[], Awaitable[None]]) -> None:
        """`bring()` is awaited by whoever wants it while it is not ready; it starts it, or raises EngineUnavailable."""
        self._bring = bring

    async def hold(self, model: str | None = None) -> None:
        """It is ready, or was never to be started by who uses it; it stays until `release`. Raises EngineUnavailable.

        An adapter that waits for its first use is brought first: NotServable when engines refuse it.
        """
        self.uses += 1
        try:
            if not self.ready and self.asleep:
                await self._until_awake()
            if self._bring is not None and not self.ready:
                await self._bring()
            if model is not None and model in self.first_use:
                if not self.ready:
                    raise self._unavailable()
                await self.first_use.bring(model)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self.uses -= 1
        self.used_at = time.monotonic()

    async def has_worker(self) -> bool:
        """Whether a worker runs that an earlier gateway has left."""
        return any(await asyncio.gather(*(replica.engine.has_worker() for replica in self.replicas)))

    # in the order of its life

    def set_desired(self, adapters: Iterable[Adapter]) -> None:
        """The adapters that the database knows for this base; before `start`."""
        self._desired = {adapter.engine_name: adapter for adapter in adapters}
        for replica in self.replicas:
            replica.engine.set_desired(self._desired.values())

    async def start(self) -> None:
        """Begins to spawn, take over or watch the replicas; returns at once (see `wait_ready`)."""
        self._started = True
        for replica in self.replicas:
            await replica.engine.start()

    async def ensure_adapter(
        self, adapter: Adapter, witness: bool = True, timeout_s: float = ENSURE_TIMEOUT_S
    ) -> WitnessReport | None:
        """Makes the adapter desired everywhere; returns a replica's witness report as soon as one serves it.

        AdapterRejected when no replica may serve it, EngineUnavailable when none did in time: then it is desired no more.
        """
        await self.hold()
        was_desired = adapter.engine_name in self._desired
        self._desired[adapter.engine_name] = adapter
        replicas = self.replicas
        asked = [
            asyncio.ensure_future(replica.engine.ensure_adapter(adapter, witness, timeout_s)) for replica in replicas
        ]
        served = False
        refused: EngineError | AdapterRejected | None = None
        try:
            for done in asyncio.as_completed(asked):
                try:
                    report = await done
                    served = True
                    return report
                except AdapterRejected as error:
                    refused = error
                except EngineError as error:
                    refused = refused or error
            raise refused or self._unavailable(why=True)
        finally:
            for replica, task in zip(replicas, asked, strict=True):
                if served:
                    self._spawn(self._catch_up(replica, adapter, task), f"{adapter.engine_name} to {replica.name}")
                else:
                    task.cancel()
            if not served:
                await asyncio.gather(*asked, return_exceptions=True)
                if not was_desired:
                    self._desired.pop(adapter.engine_name, None)
            self.release()

    async def drop_adapter(self, engine_name: str) -> None:
        """Desires it no more; takes no new request for it at once and unloads it once its replies are over."""
        self._desired.pop(engine_name, None)
        self.first_use.withdraw(engine_name)
        dropped = await asyncio.gather(
            *(replica.engine.drop_adapter(engine_name) for replica in (*self.replicas, *self.leavers)),
            return_exceptions=True,
        )
        for error in dropped:
            if isinstance(error, BaseException) and not isinstance(error, EngineError):
                raise error

    async def change(self, leave: Sequence[Replica], come: Sequence[Replica]) -> None:
        """Takes replicas in and lets others go, while requests run. One call at a time.

        One that leaves is sent nothing from now on, or, where it is the last that can answer, from when another can; it is
        stopped when its last reply is over. Where a new one has an old one's place it starts when that is gone, and the next
        such pair waits for it. Returns when only last replies are waited for.
        """
        renewed = {replica.name for replica in leave} & {replica.name for replica in come if replica.has_place}
        self._take_in([replica for replica in come if replica.name not in renewed])
        await self._until_others_answer(leave)
        for replica in leave:
            if replica.name not in renewed:
                self._let_go(replica)
        for name in sorted(renewed):
            await self._let_go(next(replica for replica in leave if replica.name == name))
            self._take_in(new := [replica for replica in come if replica.name == name])
            await self._until_others_answer([replica for replica in self.replicas if replica not in new])

    async def stop(self) -> None:
        """Ends the workers, those of leavers too. Returns when they are gone."""
        await self.first_use.stop()
        for task in self._tasks - self._ends:
            task.cancel()
        for leaver in self.leavers:
            leaver.cut_off()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.engine.stop() for replica in self.replicas))
        self._started = False

    def _take_in(self, replicas: Sequence[Replica]) -> None:
        self.replicas = (*self.replicas, *replicas)
        for replica in replicas:
            replica.engine.set_desired(self._desired.values())
            if self._started:
                self._spawn(self._start(replica), f"start {replica.name}")

    async def _start(self, replica: Replica) -> None:
        while replica.has_place and any(leaver.name == replica.name for leaver in self.leavers):  # noqa: ASYNC110 - seldom, and it may take minutes
            await asyncio.sleep(RETRY_S)
        log.info("replica %s: joins", replica.name)
        await replica.engine.start()

    async def _until_others_answer(self, leave: Sequence[Replica]) -> None:
        """Returns when one that stays can be asked, if one that leaves can; else at once, or after ten minutes."""
        staying = [replica for replica in self.replicas if replica not in leave]
        until = time.monotonic() + DRAIN_S
        while staying and self._started and time.monotonic() < until:
            if any(replica.engine.ready for replica in staying) or not any(replica.engine.ready for replica in leave):
                return
            await asyncio.sleep(CHANGE_POLL_S)

    def _let_go(self, replica: Replica) -> asyncio.Task[None]:
        self.replicas = tuple(other for other in self.replicas if other is not replica)
        self.leavers.append(replica)
        ending = self._spawn(self._end(replica), f"end {replica.name}")
        self._ends.add(ending)
        ending.add_done_callback(self._ends.discard)
        return ending

    async def _end(self, replica: Replica) -> None:
        log.info("replica %s: leaves; %d replies are under way", replica.name, replica.in_flight)
        if not await replica.drain(DRAIN_S):
            log.warning("replica %s: %d replies are cut off", replica.name, replica.in_flight)
        await replica.engine.stop()
        self.leavers.remove(replica)
        log.info("replica %s: is gone", replica.name)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _catch_up(self, replica: Replica, adapter: Adapter, asked: asyncio.Task[WitnessReport | None]) -> None:
        """Sees to it that a replica comes to serve what another serves already; `asked` is its first attempt."""
        try:
            while True:
                try:
                    await asked
                    return
                except AdapterRejected as error:
                    if self._desired.get(adapter.engine_name) is adapter:
                        log.error(
                            "replica %s: %s is not servable: %s", replica.name, adapter.engine_name, error.message
                        )
                    return
                except EngineError as error:
                    log.warning("replica %s: %s waits: %s", replica.name, adapter.engine_name, error.message)
                await asyncio.sleep(RETRY_S)
                if self._desired.get(adapter.engine_name) is not adapter or replica not in self.replicas:
                    return
                asked = asyncio.ensure_future(replica.engine.ensure_adapter(adapter, True, FOREVER))
        finally:
            asked.cancel()

    def _unavailable(self, *, why: bool = False) -> EngineUnavailable:
        states = [
            f"{replica.engine.state}: {replica.engine.reason}"
            if why and replica.engine.reason
            else replica.engine.state
            for replica in self.replicas
        ]
        return EngineUnavailable(
            f"the engine of '{self.name}' is not ready ({', '.join(states) or 'it has no replica'}); try again shortly",
            retry_after_s=2,
        )
