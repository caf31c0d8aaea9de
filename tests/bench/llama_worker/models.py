"""Random q4_0 models of real shapes and adapters for them, kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from tests.bench.llama_worker.build import cache_folder
from tests.tiny_gguf import Shape, write_tiny_gguf, write_tiny_lora

SHAPES = {
    "demo": Shape(hidden=256, layers=6, heads=8, kv_heads=4, feed_forward=768, vocab_size=4096, context_length=2048),
    "200m": Shape(
        hidden=1024, layers=16, heads=16, kv_heads=8, feed_forward=2816, vocab_size=32000, context_length=2048
    ),
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, feed_forward=8192, vocab_size=32000, context_length=2048),
}
RANK = 16


def model(shape: str) -> Path:
    """A q4_0 model of that shape."""
    path = cache_folder() / "models" / f"{shape}.gguf"
    if not path.exists():
        print(f"writing a random model of shape {shape} to {path}", flush=True)
        beside = path.with_name(f".{os.getpid()}") / path.name
        write_tiny_gguf(beside, shape=SHAPES[shape]).replace(path)
        beside.parent.rmdir()
    return path


def adapters(shape: str, count: int) -> list[Path]:
    """So many rank-16 adapters over every projection, for the model of that shape."""
    paths = []
    for index in range(count):
        path = cache_folder() / "models" / f"{shape}-lora-{index}" / "adapter.gguf"
        if not path.exists():
            write_tiny_lora(path, SHAPES[shape], index, RANK, float(RANK), 0.2)
        paths.append(path)
    return paths
