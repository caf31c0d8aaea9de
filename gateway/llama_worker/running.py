"""Sequences that generate, and the step that gives each of one adapter its next token. On the decode loop's thread.

Its rule: a step holds exactly one row of every running sequence of the adapter, in the order of their places, so that
llama.cpp computes neighbours in one pass; what a sequence gets does not depend on who else is in it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator

from gateway.errors import RequestError, TunegateError
from gateway.llama_worker.decoder import Decoder
from gateway.llama_worker.generation import Event, Finished, Generation, Sequence
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Floats, Model
from gateway.llama_worker.places import Places
from gateway.llama_worker.sampling import Sampler
from gateway.llama_worker.scoring import score_rows
from gateway.llama_worker.wire import Choice

log = logging.getLogger(__name__)

Emit = Callable[[Generation, Event], None]
Fail = Callable[[Generation, TunegateError], None]


class Running:
    """The sequences that have their prompt behind them."""

    def __init__(
        self, model: Model, decoder: Decoder, places: Places, metrics: Metrics, rows: int, emit: Emit, fail: Fail
    ) -> None:
        self._model = model
        self._decoder = decoder
        self._places = places
        self._metrics = metrics
        self._rows = rows  # in one call, at most
        self._emit = emit
        self._fail = fail  # ends one request; calls `remove`
        self._groups: dict[int, list[Sequence]] = {}  # by group, in the order of their places
        self._stepped_at: dict[int, float] = {}  # by group: its last step, or when its first sequence came

    def __iter__(self) -> Iterator[Sequence]:
        for group in self._groups.values():
            yield from group

    @property
    def groups(self) -> list[int]:
        """Those that have a sequence."""
        return list(self._groups)

    def silent_s(self, group: int) -> float:
        """How long the sequences of `group` have waited for their next token."""
        return time.monotonic() - self._stepped_at[group]

    def under_way(self, group: int) -> bool:
        """Whether a sequence of `group` has more than its first token."""
        return any(sequence.generated > 1 for sequence in self._groups[group])

    def generations(self) -> Iterator[Generation]:
        """Each once."""
        yield from dict.fromkeys(sequence.generation for sequence in self)

    def start(self, generation: Generation, logits: Floats) -> None:
        """Turns a computed prompt into its choices; `logits` choose the first token of each. NativeError."""
        request = generation.request
        if len(generation.places) > 1:
            blob = self._places.save(generation.places[0])
            for place in generation.places[1:]:
                self._places.fill(place, blob)
        for index, place in enumerate(generation.places):
            sampler = Sampler(request.sampling, request.prompt_ids, index, self._model.vocab_size, self._model.end_ids)
            sequence = Sequence(generation, index, place, sampler, len(request.prompt_ids), -1)
            generation.sequences.append(sequence)
            self._groups.setdefault(generation.group, []).append(sequence)
        self._sort(generation.group)
        self._stepped_at.setdefault(generation.group, time.monotonic())
        self._metrics.generated_tokens.inc(len(generation.sequences))
        for sequence in list(generation.sequences):
            self._advance(sequence, logits, int(logits.argmax()))

    def step(self, group: int) -> None:
        """One token for every sequence of `group`. NativeError concerns them all."""
        waiting = list(self._groups[group])
        while waiting:
            part, waiting = waiting[: self._rows], waiting[self._rows :]
            logits = self._decoder.rows(
                part[0].generation,
                [sequence.last_id for sequence in part],
                [sequence.position for sequence in part],
                [sequence.place for sequence in part],
            )
            self._metrics.generated_tokens.inc(len(part))
            for sequence, row, likeliest in zip(part, logits, logits.argmax(axis=1).tolist(), strict=True):
                sequence.position += 1
                self._advance(sequence, row, likeliest)
            waiting = [sequence for sequence in waiting if not sequence.generation.over]
        if group in self._stepped_at:  # it is not, when its last sequence has ended
            self._stepped_at[group] = time.monotonic()

    def moved(self, group: int, source: int, target: int) -> bool:
        """Follows a sequence to another place; False when none here had that place."""
        for sequence in self._groups.get(group, ()):
            if sequence.place == source:
                sequence.place = target
                places = sequence.generation.places
                places[places.index(source)] = target
                self._sort(group)
                return True
        return False

    def remove(self, generation: Generation) -> None:
        """Takes all choices of a request out; its places stay taken."""
        for sequence in generation.sequences:
            self._leave(sequence)
        generation.sequences.clear()

    def _sort(self, group: int) -> None:
        self._groups[group].sort(key=lambda sequence: sequence.place)

    def _leave(self, sequence: Sequence) -> None:
        group = self._groups[sequence.generation.group]
        group.remove(sequence)
        if not group:
            del self._groups[sequence.generation.group], self._stepped_at[sequence.generation.group]

    def _advance(self, sequence: Sequence, logits: Floats, likeliest: int) -> None:
        # Everything here is met cold, once a step and row: the weights have gone through the caches in between.
        generation = sequence.generation
        if generation.over:
            return
        if not math.isfinite(logits.item(likeliest)):  # to argmax a NaN is the largest
            name = generation.request.model
            self._fail(generation, TunegateError(f"The model {name!r} produced logits that are not finite numbers."))
            return
        sampling = generation.request.sampling
        try:
            token = sequence.sampler.choose(logits, likeliest)
        except RequestError as error:  # of its grammar
            self._fail(generation, error)
            return
        except Exception:  # whatever its parameters have led to: the others go on
            log.exception("the next token of a request could not be chosen")
            self._fail(generation, TunegateError("The worker failed on this request; its log says why."))
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
        self._emit(generation, Choice(sequence.index, [token], scores, finish_reason, stop_reason))
        if finish_reason:
            self._end(sequence, finish_reason)

    def _end(self, sequence: Sequence, reason: str) -> None:
        generation = sequence.generation
        self._metrics.finished.labels(reason).inc()
        self._leave(sequence)
        generation.sequences.remove(sequence)
        generation.places.remove(sequence.place)
        self._places.give_back(sequence.place)
        if not generation.sequences:
            generation.over = True
            scores = generation.prompt_scores if generation.request.prompt_logprobs is not None else None
            self._emit(generation, Finished(scores, generation.cached))
