"""One llama_decode with what goes with it: the adapter's form, the clock and the count. On the decode loop's thread.

What a number depends on, measured on x86 with AVX-512 and q4_0 (`python -m tests.bench.llama_worker.bits` prints it anew):

    what changes                                      largest change of a logit
    another stream, the same call again               none
    prompt chunks of 8 to 200 rows                    none (flash attention on: 0.16)
    eight prompts in one call                         none
    2, 3, 5 decode rows instead of 1                  none (flash attention on, from 512 positions on: 0.16)
    8 decode rows instead of 1                        2e-6: the q6_K output matrix has another kernel from 8 rows on
    a prompt one row at a time                        0.14: attention has dot products for one row, tinyBLAS for more
    an adapter with one row and with several          0.15: see adapter_forms

So: prompt rows and decode rows never share a call (llama.cpp would cut the chunk to mix them); KV that decode rows wrote is
never reused for a prompt; the K-quants' kernel for many rows is switched off (it would gain 5% at 16 rows of this model, and
nothing at 8); and flash attention is off. That costs: eight streams decode at 224 tokens/s instead of 300 at 60 positions, at
175 instead of 208 at 550.

With that, the same holds for weights in q4_1, q5_0, q8_0, iq4_nl, q5_K and q6_K. It does not for q4_K, whose repacked kernels
differ between 3 rows and 4 (0.18), for bf16 (0.04) and for f16 (0.005), whose one row is a dot product and whose several
are tinyBLAS: there, a reply may change with what else runs.
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
        logits, seconds = self._run("decode", ids, positions, places, [True] * len(ids))
        if changed:
            self._first_after_change = (len(ids), seconds)
        elif self._first_after_change:
            rows, first_s = self._first_after_change
            if rows == len(ids):
                self._turns.changed(first_s, seconds)
            self._first_after_change = None
        return logits

    def _run(
        self, kind: str, ids: list[int], positions: list[int], places: list[int], wanted: list[bool]
    ) -> tuple[Floats, float]:
        started = time.perf_counter()
        logits = self._context.decode(ids, positions, places, wanted)
        seconds = time.perf_counter() - started
        self._metrics.step_seconds[kind].observe(seconds)
        return logits, seconds
