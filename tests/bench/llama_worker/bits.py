"""What a logit depends on in this build, on this CPU: `python -m tests.bench.llama_worker.bits`.

Prints, for each way to compute the same 200 positions, the largest change of a logit and how many rows are bit-equal, with
flash attention off and on; then how far the numbers are from f32. The rules of gateway/llama_worker/steady.py, filling.py and
adapter_forms.py come from this table.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gateway.llama_worker.adapter_forms import Forms, read
from gateway.llama_worker.native import (
    FLASH_ATTENTION_OFF,
    FLASH_ATTENTION_ON,
    Adapter,
    Context,
    ContextSize,
    Floats,
    Model,
    NativeLog,
)
from gateway.llama_worker.steady import AdapterForm
from tests.tiny_gguf import Shape, as_f32, write_tiny_gguf, write_tiny_lora

SHAPE = Shape(hidden=512, layers=4, heads=8, kv_heads=4, feed_forward=1408, vocab_size=4096, context_length=2048)
LENGTH, LONG = 200, 700
CHUNKS = (8, 16, 32, 63, 100, 200, 4, 3, 2)
ROWS = (2, 3, 5, 8)
STRENGTHS = (0.1, 0.3, 1.0)


def main() -> None:
    """Measures and prints."""
    threads = len(os.sched_getaffinity(0))
    print(f"GGML_CPU_TILED_MM={os.environ.get('GGML_CPU_TILED_MM', 'unset')}, {threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        model = Model(write_tiny_gguf(Path(folder) / "model.gguf", shape=SHAPE), NativeLog())
        path = write_tiny_lora(Path(folder) / "adapter.gguf", SHAPE, 1, 16, 16.0, 0.3)
        forms = {kind: Forms(model, path, kind, read(path, kind).made) for kind in AdapterForm}
        for name, flash_attention in (("off", FLASH_ATTENTION_OFF), ("on", FLASH_ATTENTION_ON)):
            print(f"\nflash attention {name}")
            context = Context(model, ContextSize(1024, 8, 1024), threads, flash_attention)
            _measure(context, forms)
            context.close()
        _against_f32(model, Path(folder), threads)
        for form in forms.values():
            form.close()
        model.close()


def _measure(context: Context, forms: dict[AdapterForm, Forms]) -> None:
    random = np.random.default_rng(0)
    prompts = random.integers(3, SHAPE.vocab_size, (8, LENGTH)).tolist()
    first = prompts[0]
    chunked = compute(context, [first], 64)
    _print("the same again", chunked, compute(context, [first], 64))
    _print("another stream", chunked, compute(context, [first], 64, seats=[3]))
    _print("eight prompts in one call", chunked, compute(context, prompts, 64))
    for size in CHUNKS:
        _print(f"chunks of {size}, not 64", chunked, compute(context, [first], size))
    _print("one row at a time, not chunks", chunked, compute(context, [first], 1))
    alone = compute(context, [first], 1)
    for rows in ROWS:
        _print(f"{rows} decode rows, not 1", alone, compute(context, prompts[:rows], 1))
    long = random.integers(3, SHAPE.vocab_size, (2, LONG)).tolist()
    _print(f"2 decode rows, not 1, at {LONG} positions", compute(context, long[:1], 1), compute(context, long, 1))
    as_it_is = compute(context, [first], 1, adapter=forms[AdapterForm.AS_IT_IS].for_decoding)
    for kind, form in forms.items():
        adapter = form.for_decoding
        alone = compute(context, [first], 1, adapter=adapter)
        _print(f"adapter, {kind.value}: 3 decode rows, not 1", alone, compute(context, prompts[:3], 1, adapter=adapter))
        _print(f"adapter, {kind.value}, not as it is", as_it_is, alone)


def _against_f32(model: Model, folder: Path, threads: int) -> None:
    """What q4_0's kernels and adapters of eight bits change, beside the same weights and the adapter as it is in f32."""
    as_f32(folder / "model.gguf", folder / "f32.gguf")
    exact = Model(folder / "f32.gguf", NativeLog())
    contexts = Context(exact, ContextSize(256, 8, 64, "f32"), threads), Context(model, ContextSize(256, 8, 64), threads)
    prompt = np.random.default_rng(0).integers(3, SHAPE.vocab_size, (1, LENGTH)).tolist()
    base, served = (_logprobs(compute(context, prompt, 64)) for context in contexts)
    print(f"\nlog-probabilities beside f32, mean error (largest)\n  {'the base':44} {_error(served, base)}")
    for strength in STRENGTHS:
        path = write_tiny_lora(folder / f"{strength}.gguf", SHAPE, 1, 16, 16.0, strength)
        of_exact = Forms(exact, path, AdapterForm.AS_IT_IS)
        expected = _logprobs(compute(contexts[0], prompt, 64, adapter=of_exact.for_prompts))
        line = f"  {f'an adapter that moves them by {np.abs(expected - base).mean():.2f}':44}"
        for kind in (AdapterForm.AS_IT_IS, AdapterForm.EIGHT_BITS):
            forms = Forms(model, path, kind, read(path, kind).made)
            measured = _logprobs(compute(contexts[1], prompt, 64, adapter=forms.for_prompts))
            line += f" {kind.value} {_error(measured, expected)}"
        print(line, flush=True)


def _logprobs(logits: Floats) -> Floats:
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True)).astype(np.float32)


def _error(measured: Floats, expected: Floats) -> str:
    return f"{np.abs(measured - expected).mean():.4f} ({np.abs(measured - expected).max():.2f})"


def compute(
    context: Context, prompts: Sequence[list[int]], size: int, seats: Sequence[int] = (), adapter: Adapter | None = None
) -> Floats:
    """The logits of the first of some prompts, computed side by side in chunks of `size`: (positions, vocab)."""
    seats = seats or range(len(prompts))
    for seat in seats:
        context.clear(seat)
    context.use_adapter(adapter)
    found = []
    for start in range(0, len(prompts[0]), size):
        parts = [prompt[start : start + size] for prompt in prompts]
        width = len(parts[0])
        logits = context.decode(
            [token for part in parts for token in part],
            list(range(start, start + width)) * len(parts),
            [seat for seat in seats for _ in range(width)],
            [True] * width * len(parts),
        )
        found.append(logits[:width].copy())
    return np.concatenate(found)


def _print(what: str, expected: Floats, measured: Floats) -> None:
    change = np.abs(expected - measured).max(axis=1)
    print(f"  {what:44} {change.max():8.2g}   {int((change == 0).sum()):4d} of {len(change)} rows equal", flush=True)


if __name__ == "__main__":
    main()
