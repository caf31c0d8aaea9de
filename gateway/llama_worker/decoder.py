"""One llama_decode with what goes with it: the adapter's form and the clock. On the decode loop's thread.

Its rule: prompt rows and decode rows never share a call (see steady for why, and for how many rows one may have).
"""

from __future__ import annotations

import time

from gateway.llama_worker.adapters import Adapters
from gateway.llama_worker.generation import Generation
from gateway.llama_worker.metrics import Metrics
from gateway.llama_worker.native import Context, Floats
from gateway.llama_worker.turns import Turns


class Decoder:
    """Runs batches of prompt rows or of decode rows, each under one adapter."""

    def __init__(self, context: Context, adapters: Adapters, metrics: Metrics, turns: Turns) -> None:
        self._context = context
        self._adapters = adapters
        self._metrics = metrics
        self._turns = turns
        self._first_after_change: tuple[int, float] | None = None  # rows and seconds of a decode step

    def prompt(self, generation: Generation, ids: list[int], wanted: list[bool]) -> Floats:
        """Computes the next rows of a prompt; the logits of the wanted ones. NativeError."""
        start = generation.computed
        places = [generation.places[0]] * len(ids)
        entry = generation.adapter
        self._context.use_adapter(self._adapters.forms(entry).for_prompts if entry else None)
        logits, _ = self._run("prompt", ids, list(range(start, start + len(ids))), places, wanted)
        return logits

    def rows(self, generation: Generation, ids: list[int], positions: list[int], places: list[int]) -> Floats:
        """One token of each of some sequences, all of the adapter of `generation`: logits (rows, vocab). NativeError."""
        entry = generation.adapter
        adapter = self._adapters.forms(entry).for_decoding if entry else None
        changed = adapter is not self._context.adapter
        self._context.use_adapter(adapter)
        logits, seconds = self._run("decode", ids, positions, places, None)
        if changed:
            self._first_after_change = (len(ids), seconds)
        elif self._first_after_change:
            rows, first_s = self._first_after_change
            if rows == len(ids):
                self._turns.changed(first_s, seconds)
            self._first_after_change = None
        return logits

    def _run(
        self, kind: str, ids: list[int], positions: list[int], places: list[int], wanted: list[bool] | None
    ) -> tuple[Floats, float]:
        started = time.perf_counter()
        logits = self._context.decode(ids, positions, places, wanted)
        seconds = time.perf_counter() - started
        self._metrics.steps.observe(kind, seconds)
        return logits, seconds
