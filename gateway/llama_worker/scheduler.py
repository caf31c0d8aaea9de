"""The decode loop: which request runs in which round. The worker's main thread lives here.

One round = the commands that arrived, then for the adapter whose turn it is one prompt chunk of one request and one decode
step of all its running sequences; where several prompts wait, a step every PATIENCE_S. So sequences join and leave at every
round, a long prompt holds up the others by a chunk at a time, and a cancelled request is out within one step.

    inbox ──▶ waiting ──places, adapter──▶ filling ──last chunk──▶ running ──▶ events, one hand-over a round
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator

from gateway.errors import EngineUnavailable, ModelNotFound, TunegateError
from gateway.llama_worker.adapter_forms import ReadFile
from gateway.llama_worker.adapters import Adapters, Registered
from gateway.llama_worker.decoder import Decoder
from gateway.llama_worker.filling import Filling
from gateway.llama_worker.generation import Event, Generation
from gateway.llama_worker.heartbeat import Heartbeat
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Context, Model, NativeError
from gateway.llama_worker.places import Places
from gateway.llama_worker.prefix_cache import PrefixCache
from gateway.llama_worker.running import Running
from gateway.llama_worker.turns import Turns

log = logging.getLogger(__name__)

Reply = Callable[[TunegateError | None], None]

# How long running sequences wait while there are several prompts: those that came together then run together. A step of few
# rows costs nearly as much as one of many (8 rows 26 ms and 16 rows 31 ms without their logits, at 200M parameters). Where
# none of them has more than its first token, nobody has seen them run yet.
PATIENCE_S, FIRST_PATIENCE_S = 0.2, 2.0
FAILURES_IN_A_ROW = 3  # then the process gives up: a fresh one is the better cure
LONGEST_RETRY_AFTER_S = 60
MOST_OVERTAKING = 32  # requests that may pass one whose adapter cannot be had yet
LOOK_AGAIN_S = 0.002  # whether an adapter has been read
REPORT_EVERY_S = 0.02  # the gauges; a small model makes a thousand steps a second
MEMORY = 0.3  # of a new measurement in a running mean


class Scheduler:
    """Owns the context; `submit`, `cancel`, `load`, `unload`, `attend` and `stop` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        context: Context,
        adapters: Adapters,
        served_name: str,
        cache: PrefixCache,
        metrics: Metrics,
        publish: Callable[[list[tuple[Generation, Event]]], None],
        rows: int,
    ) -> None:
        self._context = context
        self._adapters = adapters
        self._served_name = served_name
        self._metrics = metrics
        self._publish = publish
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: list[tuple[Generation, Event]] = []
        self._turns = Turns()
        self._places = Places(context)
        self._decoder = Decoder(context, adapters, metrics, self._turns)
        self._waiting: deque[Generation] = deque()
        self._filling = Filling(self._decoder, self._places, cache, metrics)
        self._running = Running(model, self._decoder, self._places, metrics, rows, self._emit, self._fail_one)
        self._errands: deque[tuple[Iterator[bool], Reply]] = deque()
        self._unloading: list[tuple[Registered, Reply]] = []
        self._failures = 0
        self._reported_at = 0.0
        self._stop_at: float | None = None
        self._counted = 0  # places that were free again at the last look
        self._counted_at = time.monotonic()
        self._place_every_s = 1.0  # one has become free so often of late
        self.heartbeat = Heartbeat()
        metrics.kv_capacity.set(context.context * context.size.sequences)

    def submit(self, generation: Generation) -> None:
        """Queues a request."""
        self._put(lambda: self._enqueue(generation))

    def cancel(self, generation: Generation) -> None:
        """Ends a request within a round; no further event is delivered."""
        self._put(lambda: self._drop(generation))

    def load(self, name: str, directory: str | None, reply: Reply) -> None:
        """Registers an adapter between two rounds, one a round; `reply` is called on the loop's thread."""
        self._adapters.read(directory).add_done_callback(
            lambda done: self.attend(self._load(name, directory, done.result()), reply)
        )

    def unload(self, name: str, reply: Reply) -> None:
        """Withdraws a name at once and replies when its last request has ended."""
        self._put(lambda: self._unload(name, reply))

    def attend(self, steps: Iterator[bool], reply: Reply) -> None:
        """Takes one of `steps` a round; where one gives True, another errand's may come next.

        `reply` is called on the loop's thread.
        """
        self._put(lambda: self._errands.append((steps, reply)))

    def stop(self, grace_s: float) -> None:
        """Ends the loop when nothing runs, or after `grace_s`. Safe in a signal handler."""
        self._put(lambda: self._stop(grace_s))

    def retry_after_s(self, ahead: int) -> int:
        """When a request behind `ahead` others may find room, at the pace of late. For any thread."""
        since_s = time.monotonic() - self._counted_at
        expected_s = max(self._place_every_s, since_s) * max(1, ahead)
        return max(1, min(LONGEST_RETRY_AFTER_S, math.ceil(expected_s)))

    def run(self) -> None:
        """The loop. Returns after `stop`; NativeError when llama.cpp keeps failing."""
        while True:
            self._take_commands()
            if self._stop_at is not None and (not self._busy or time.monotonic() >= self._stop_at):
                break
            self._start_waiting()
            self._compute()
            self._step_errand()
            self._free_withdrawn()
            self._flush()
            self.heartbeat.beat()
        stopping = EngineUnavailable("The worker is shutting down.", retry_after_s=1)
        for generation in list(self._generations()):
            self._fail_one(generation, stopping)
        for _, reply in self._errands:
            reply(stopping)
        self._free_withdrawn()  # nothing uses them any more
        self._flush()

    def _put(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)
        self.heartbeat.asked()

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or len(self._filling) or self._running.groups or self._errands)

    @property
    def _at_work(self) -> bool:
        """Whether something can go on: not all that there is waits for an adapter."""
        groups = self._running.groups
        return bool(self._errands or len(self._filling) or any(self._adapters.prepared(group) for group in groups))

    def _take_commands(self) -> None:
        if not self._busy and self._stop_at is None:
            self.heartbeat.rest()
            command = self._inbox.get()
            self.heartbeat.asked()
            command()
        elif not self._at_work:  # the thread that reads adapters has the processor
            with contextlib.suppress(queue.Empty):
                self._inbox.get(timeout=LOOK_AGAIN_S)()
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    # Commands, on the loop's thread

    def _enqueue(self, generation: Generation) -> None:
        name = generation.request.model
        if name != self._served_name:
            generation.adapter = self._adapters.get(name)
            if generation.adapter is None:
                self._fail_one(generation, ModelNotFound(name))
                self._flush()
                return
        self._waiting.append(generation)

    def _drop(self, generation: Generation) -> None:
        if not generation.over:
            self._metrics.finished.labels("cancelled").inc(len(generation.places) or generation.request.n)
            self._release(generation, keep_prompt=True)
        if not self._busy:
            self._free_withdrawn()
            self._flush()

    def _load(self, name: str, directory: str | None, read: ReadFile | None) -> Iterator[bool]:
        self._adapters.load(name, directory, read, self._context, self._adapters_used())
        self._count_adapters()
        yield from ()

    def _unload(self, name: str, reply: Reply) -> None:
        try:
            entry = self._adapters.withdraw(name)
        except TunegateError as error:
            reply(error)
            return
        self._count_adapters()
        self._unloading.append((entry, reply))
        self._free_withdrawn()

    def _stop(self, grace_s: float) -> None:
        if self._stop_at is None:
            self._stop_at = time.monotonic() + grace_s

    # One round

    def _start_waiting(self) -> None:
        # First come, first served: a request with a large n waits for its places, and nobody overtakes it. One whose adapter
        # has no room in memory, or is being read, is overtaken by so many and no more.
        blocked: list[Generation] = []
        for generation in list(self._waiting) if self._places.free else ():
            if self._places.free < generation.request.n or any(each.overtaken >= MOST_OVERTAKING for each in blocked):
                return
            adapter = generation.adapter
            loads = adapter is not None and not self._adapters.holds(adapter.serial)
            try:
                if adapter is not None and not self._adapters.bring_in(adapter, self._context, self._adapters_used()):
                    blocked.append(generation)
                    continue
            except TunegateError as error:
                self._fail_one(generation, error)
                continue
            self._waiting.remove(generation)
            for each in blocked:
                each.overtaken += 1
            generation.places = self._places.take(generation.group, generation.request.n)
            self._filling.add(generation)
            if loads:
                return  # llama.cpp takes about as long for it as for a step: one a round

    def _compute(self) -> None:
        prepared = [group for group in self._running.groups if self._adapters.prepared(group)]
        groups = list(dict.fromkeys([*(each.group for each in self._filling), *prepared]))
        if not groups:
            return
        before, group = self._turns.current, self._turns.next(groups)
        if group != before:
            self._metrics.turns.inc()
        try:
            done = self._filling.compute_chunk(group)
            if done is not None:
                self._running.start(*done)
                self._flush()  # a first token does not wait for the step that follows
        except NativeError as error:
            self._native_failure([self._filling.current] if self._filling.current else [], error)
        if group not in self._running.groups or not self._adapters.prepared(group):
            return
        patience_s = PATIENCE_S if self._running.under_way(group) else FIRST_PATIENCE_S
        if self._filling.waiting(group) > 1 and self._running.silent_s(group) < patience_s:
            return
        try:
            self._close_gap(group)
            self._running.step(group)
            self._failures = 0
        except NativeError as error:
            self._native_failure([each for each in self._running.generations() if each.group == group], error)
        except TunegateError as error:  # its adapter cannot be had
            for generation in [each for each in self._running.generations() if each.group == group]:
                self._fail_one(generation, error)

    def _close_gap(self, group: int) -> None:
        move = self._places.close_gap(group)
        if move is None:
            return
        self._metrics.moves.inc()
        if not self._running.moved(group, *move):
            source, target = move
            generation = next(each for each in self._filling if source in each.places)
            generation.places[generation.places.index(source)] = target

    def _step_errand(self) -> None:
        if not self._errands:
            return
        steps, reply = self._errands.popleft()
        try:
            others_first = next(steps)
        except StopIteration:
            reply(None)
        except NativeError as error:
            log.error("an errand failed: %s", error)
            reply(TunegateError(f"llama.cpp failed: {error}"))
        except TunegateError as error:
            reply(error)
        else:
            (self._errands.append if others_first else self._errands.appendleft)((steps, reply))

    def _emit(self, generation: Generation, event: Event) -> None:
        self._events.append((generation, event))

    def _release(self, generation: Generation, keep_prompt: bool = False) -> None:
        """Takes a generation out of the loop, wherever it is."""
        generation.over = True
        if generation in self._waiting:
            self._waiting.remove(generation)
            adapter = generation.adapter
            if adapter is not None and all(each.adapter is not adapter for each in self._waiting):
                self._adapters.give_up(adapter)
        if generation in self._filling:
            self._filling.remove(generation, keep_prompt)
        self._running.remove(generation)
        for place in generation.places:
            self._places.give_back(place)
        generation.places.clear()

    def _fail_one(self, generation: Generation, error: TunegateError) -> None:
        self._metrics.finished.labels("error").inc(len(generation.places) or generation.request.n)
        self._release(generation)
        self._emit(generation, error)

    def _native_failure(self, generations: list[Generation], error: NativeError) -> None:
        log.error("a decode failed: %s", error)
        self._failures += 1
        for generation in generations:
            if not generation.over:
                self._fail_one(generation, TunegateError(f"llama.cpp failed: {error}"))
        if self._failures >= FAILURES_IN_A_ROW:
            self._flush()
            raise error

    def _generations(self) -> Iterator[Generation]:
        yield from self._waiting
        yield from self._filling
        yield from self._running.generations()

    def _adapters_used(self) -> set[int]:
        return {each.group for each in [*self._filling, *self._running.generations()] if each.adapter}

    def _free_withdrawn(self) -> None:
        if not self._unloading:
            return
        used = {each.group for each in self._generations()}
        for entry, reply in [entry for entry in self._unloading if entry[0].serial not in used]:
            self._unloading.remove((entry, reply))
            self._adapters.free(entry, self._context)
            reply(None)
        self._count_adapters()

    def _count_adapters(self) -> None:
        self._metrics.adapters.set(len(self._adapters.names()))
        self._metrics.adapters_in_memory.set(self._adapters.in_memory)

    def _pace(self) -> None:
        """Keeps the mean time from one freed place to the next while there are requests in the queue."""
        freed, now = self._places.given_back - self._counted, time.monotonic()
        if freed and self._waiting:
            self._place_every_s += MEMORY * ((now - self._counted_at) / freed - self._place_every_s)
        if freed or not self._waiting:
            self._counted, self._counted_at = self._places.given_back, now

    def _flush(self) -> None:
        self._pace()
        now = time.monotonic()
        if now - self._reported_at >= REPORT_EVERY_S or not self._busy:
            self._reported_at = now
            self._report()
        if self._events:
            events, self._events = self._events, []
            self._publish(events)

    def _report(self) -> None:
        self._metrics.loop_cpu.set(time.thread_time() - self._context.native_cpu_s)
        self._metrics.running.set(self._places.taken)
        self._metrics.kv_positions.set(self._places.positions_used)
        self._metrics.waiting.set(len(self._waiting))
