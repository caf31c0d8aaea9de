"""The decode loop: which sequence runs in which step. The worker's main thread lives here.

One round = the commands that arrived, one prompt chunk of one request, then one decode step for each adapter in use. So
sequences join and leave at every round, a long prompt never stalls the others for more than a chunk, and every running
sequence gets one token a round whatever its adapter.

Its rules, which make a reply the same alone and under load:
- a prompt is computed in chunks whose borders lie at multiples of PROMPT_CHUNK, one request a decode;
- a decode step holds one token of each sequence of one adapter, and each sequence's KV is a stream of its own;
- KV belongs to one request, hence to one adapter: it is cleared before its place is given to another.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from gateway.errors import EngineUnavailable, ModelNotFound, RequestError, TunegateError
from gateway.llama_worker.adapters import Adapters
from gateway.llama_worker.generation import Event, Finished, Generation, Sequence
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Adapter, Context, Floats, Model, NativeError
from gateway.llama_worker.sampling import Sampler
from gateway.llama_worker.scoring import score_rows
from gateway.llama_worker.wire import Choice

log = logging.getLogger(__name__)

PROMPT_CHUNK = 64
FAILURES_IN_A_ROW = 3  # then the process gives up: a fresh one is the better cure


class Scheduler:
    """Owns the context; `submit`, `cancel`, `load`, `unload` and `stop` may be called from any thread."""

    def __init__(
        self,
        model: Model,
        context: Context,
        adapters: Adapters,
        served_name: str,
        metrics: Metrics,
        publish: Callable[[list[tuple[Generation, Event]]], None],
    ) -> None:
        self._model = model
        self._context = context
        self._adapters = adapters
        self._served_name = served_name
        self._metrics = metrics
        self._publish = publish
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: list[tuple[Generation, Event]] = []
        self._waiting: deque[Generation] = deque()
        self._filling: deque[Generation] = deque()
        self._running: list[Sequence] = []
        self._free_places = list(range(context.size.sequences))[::-1]
        self._unloading: list[tuple[str, Adapter, Callable[[TunegateError | None], None]]] = []
        self._failures = 0
        self._stop_at: float | None = None
        self._errands: deque[tuple[Iterator[bool], Callable[[TunegateError | None], None]]] = deque()

    def submit(self, generation: Generation) -> None:
        """Queues a request."""
        self._inbox.put(lambda: self._enqueue(generation))

    def cancel(self, generation: Generation) -> None:
        """Ends a request within a round; no further event is delivered."""
        self._inbox.put(lambda: self._drop(generation))

    def attend(self, steps: Iterator[bool], reply: Callable[[TunegateError | None], None]) -> None:
        """Takes one of `steps` a round; where one gives True, another errand's may come next.

        `reply` is called on the loop's thread.
        """
        self._inbox.put(lambda: self._errands.append((steps, reply)))

    def load(self, name: str, directory: str | None, reply: Callable[[TunegateError | None], None]) -> None:
        """Loads an adapter between two rounds; `reply` is called on the loop's thread."""
        self._inbox.put(lambda: self._load(name, directory, reply))

    def unload(self, name: str, reply: Callable[[TunegateError | None], None]) -> None:
        """Withdraws a name at once and replies when its last request has ended."""
        self._inbox.put(lambda: self._unload(name, reply))

    def stop(self, grace_s: float) -> None:
        """Ends the loop when nothing runs, or after `grace_s`. Safe in a signal handler."""
        self._inbox.put(lambda: self._stop(grace_s))

    def run(self) -> None:
        """The loop. Returns after `stop`; NativeError when llama.cpp keeps failing."""
        while True:
            self._take_commands()
            if self._stop_at is not None and (not self._busy or time.monotonic() >= self._stop_at):
                break
            self._start_waiting()
            self._compute_prompt_chunk()
            for adapter in self._adapters_in_use():
                self._decode_step(adapter)
            self._step_errand()
            self._free_withdrawn()
            self._flush()
        self._fail(list(self._generations()), EngineUnavailable("The worker is shutting down.", retry_after_s=1))
        for _, reply in self._errands:
            reply(EngineUnavailable("The worker is shutting down.", retry_after_s=1))
        self._flush()

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._filling or self._running or self._errands)

    def _take_commands(self) -> None:
        if not self._busy and self._stop_at is None:
            self._inbox.get()()
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
                self._fail([generation], ModelNotFound(name))
                self._flush()
                return
        self._waiting.append(generation)

    def _drop(self, generation: Generation) -> None:
        if not generation.over:
            self._metrics.finished.labels("cancelled").inc(len(generation.places) or generation.request.n)
            self._release(generation)
        if not self._busy:
            self._free_withdrawn()
            self._flush()

    def _load(self, name: str, directory: str | None, reply: Callable[[TunegateError | None], None]) -> None:
        try:
            self._adapters.load(name, directory)
        except TunegateError as error:
            reply(error)
            return
        self._metrics.adapters.set(len(self._adapters.names()))
        reply(None)

    def _unload(self, name: str, reply: Callable[[TunegateError | None], None]) -> None:
        try:
            adapter = self._adapters.withdraw(name)
        except TunegateError as error:
            reply(error)
            return
        self._metrics.adapters.set(len(self._adapters.names()))
        self._unloading.append((name, adapter, reply))
        self._free_withdrawn()

    def _stop(self, grace_s: float) -> None:
        if self._stop_at is None:
            self._stop_at = time.monotonic() + grace_s

    # One round

    def _start_waiting(self) -> None:
        # First come, first served: a request with a large n waits for its places, and nobody overtakes it.
        while self._waiting and len(self._free_places) >= self._waiting[0].request.n:
            generation = self._waiting.popleft()
            generation.places = [self._free_places.pop() for _ in range(generation.request.n)]
            self._filling.append(generation)

    def _compute_prompt_chunk(self) -> None:
        if not self._filling:
            return
        generation = self._filling.popleft()
        request = generation.request
        start = generation.computed
        ids = request.prompt_ids[start : start - start % PROMPT_CHUNK + PROMPT_CHUNK]
        end = start + len(ids)
        last = end == len(request.prompt_ids)
        scored = request.prompt_logprobs is not None
        wanted = [scored] * (len(ids) - 1) + [scored or last]
        places = [generation.places[0]] * len(ids)
        try:
            logits = self._decode("prompt", generation.adapter, ids, list(range(start, end)), places, wanted)
        except NativeError as error:
            self._native_failure([generation], error)
            return
        generation.computed = end
        self._metrics.prompt_tokens.inc(len(ids))
        if scored:
            following = request.prompt_ids[start + 1 : end + 1]
            generation.prompt_scores += score_rows(logits[: len(following)], following, request.prompt_logprobs or 0)
        if last:
            self._start_choices(generation, logits[-1])
        else:
            self._filling.append(generation)

    def _start_choices(self, generation: Generation, logits: Floats) -> None:
        request = generation.request
        for place in generation.places[1:]:
            self._context.copy(generation.places[0], place)
        for index, place in enumerate(generation.places):
            sampler = Sampler(request.sampling, request.prompt_ids, index, self._model.vocab_size, self._model.end_ids)
            sequence = Sequence(generation, index, place, sampler, len(request.prompt_ids), -1)
            generation.sequences.append(sequence)
            self._running.append(sequence)
        for sequence in list(generation.sequences):
            self._advance(sequence, logits)

    def _decode_step(self, adapter: Adapter | None) -> None:
        group = [sequence for sequence in self._running if sequence.generation.adapter is adapter]
        try:
            logits = self._decode(
                "decode",
                adapter,
                [sequence.last_id for sequence in group],
                [sequence.position for sequence in group],
                [sequence.place for sequence in group],
                [True] * len(group),
            )
        except NativeError as error:
            self._native_failure(list({id(s.generation): s.generation for s in group}.values()), error)
            return
        for row, sequence in enumerate(group):
            sequence.position += 1
            self._advance(sequence, logits[row])

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
        else:
            (self._errands.append if others_first else self._errands.appendleft)((steps, reply))

    def _decode(
        self,
        kind: str,
        adapter: Adapter | None,
        ids: list[int],
        positions: list[int],
        places: list[int],
        wanted: list[bool],
    ) -> Floats:
        started = time.perf_counter()
        self._context.use_adapter(adapter)
        logits = self._context.decode(ids, positions, places, wanted)
        self._metrics.step_seconds.labels(kind).observe(time.perf_counter() - started)
        self._failures = 0
        return logits

    def _advance(self, sequence: Sequence, logits: Floats) -> None:
        generation = sequence.generation
        if generation.over:
            return
        if not np.isfinite(logits.max()):
            name = generation.request.model
            self._fail([generation], TunegateError(f"The model {name!r} produced logits that are not finite numbers."))
            return
        sampling = generation.request.sampling
        try:
            token = sequence.sampler.choose(logits)
        except RequestError as error:  # of its grammar
            self._fail([generation], error)
            return
        sequence.last_id = token
        sequence.generated += 1
        finish_reason, stop_reason = None, None
        if token in self._model.end_ids and not sampling.ignore_eos:
            finish_reason = "stop"
        elif token in sampling.stop_ids:
            finish_reason, stop_reason = "stop", token
        elif sequence.sampler.ended:
            finish_reason = "stop"
        elif sequence.generated >= sampling.max_tokens:
            finish_reason = "length"
        wanted = generation.request.logprobs
        scores = [] if wanted is None else score_rows(logits[None], [token], wanted)
        self._events.append((generation, Choice(sequence.index, [token], scores, finish_reason, stop_reason)))
        self._metrics.generated_tokens.inc()
        if finish_reason:
            self._end(sequence, finish_reason)

    def _end(self, sequence: Sequence, reason: str) -> None:
        generation = sequence.generation
        self._metrics.finished.labels(reason).inc()
        self._running.remove(sequence)
        generation.sequences.remove(sequence)
        generation.places.remove(sequence.place)
        self._context.clear(sequence.place)
        self._free_places.append(sequence.place)
        if not generation.sequences:
            generation.over = True
            scores = generation.prompt_scores if generation.request.prompt_logprobs is not None else None
            self._events.append((generation, Finished(scores)))

    def _release(self, generation: Generation) -> None:
        """Takes a generation out of the loop, wherever it is."""
        generation.over = True
        for line in (self._waiting, self._filling):
            if generation in line:
                line.remove(generation)
        self._running = [sequence for sequence in self._running if sequence.generation is not generation]
        generation.sequences.clear()
        for place in generation.places:
            self._context.clear(place)
            self._free_places.append(place)
        generation.places.clear()

    def _fail(self, generations: list[Generation], error: TunegateError) -> None:
        for generation in generations:
            self._metrics.finished.labels("error").inc(len(generation.places) or generation.request.n)
            self._release(generation)
            self._events.append((generation, error))

    def _native_failure(self, generations: list[Generation], error: NativeError) -> None:
        log.error("a decode failed: %s", error)
        self._failures += 1
        self._fail(generations, TunegateError(f"llama.cpp failed: {error}"))
        if self._failures >= FAILURES_IN_A_ROW:
            self._flush()
            raise error

    def _adapters_in_use(self) -> list[Adapter | None]:
        # The adapter of the last decode comes first: a switch makes llama.cpp rebuild its graph.
        found = list(dict.fromkeys(sequence.generation.adapter for sequence in self._running))
        return sorted(found, key=lambda adapter: adapter is not self._context.adapter)

    def _generations(self) -> Iterator[Generation]:
        yield from self._waiting
        yield from self._filling
        yield from dict.fromkeys(sequence.generation for sequence in self._running)

    def _free_withdrawn(self) -> None:
        if not self._unloading:
            return
        used = {id(generation.adapter) for generation in self._generations()}
        for entry in [entry for entry in self._unloading if id(entry[1]) not in used]:
            name, adapter, reply = entry
            self._unloading.remove(entry)
            if self._context.adapter is adapter:
                self._context.use_adapter(None)  # a freed adapter must be on no context
            self._adapters.free(name)
            reply(None)

    def _flush(self) -> None:
        self._metrics.running.set(self._context.size.sequences - len(self._free_places))
        self._metrics.waiting.set(len(self._waiting))
        if self._events:
            events, self._events = self._events, []
            self._publish(events)
