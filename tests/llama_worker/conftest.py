"""The random models and adapters that the worker's tests share, and one worker that most of them use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llama_worker.running import RunningWorker, running
from tests.tiny_gguf import Shape, write_tiny_gguf, write_tiny_lora

# Slow enough (some hundred tokens a second) that a test can act while a request runs.
SLOW = Shape(hidden=512, layers=8, heads=8, kv_heads=4, feed_forward=1408, vocab_size=4096, context_length=4096)

# Small, but with the row sizes at which ggml picks its real kernels.
MIDDLE = Shape(hidden=256, layers=4, heads=4, kv_heads=2, feed_forward=768, vocab_size=2048, context_length=2304)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf")


@pytest.fixture(scope="session")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("slow") / "model.gguf", shape=SLOW)


@pytest.fixture(scope="session")
def middle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("middle") / "model.gguf", shape=MIDDLE)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for the tiny model: folder by name."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("red", "blue"), start=1):
        write_tiny_lora(root / name / "adapter.gguf", seed=seed)
    return {name: root / name for name in ("red", "blue")}


@pytest.fixture(scope="session")
def worker(
    tiny_model: Path, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    """A worker with the tiny model and both adapters."""
    with running(tmp_path_factory.mktemp("worker"), tiny_model) as started:
        for name, folder in adapter_folders.items():
            assert started.load(name, folder).status_code == 200
        yield started


@pytest.fixture(scope="session")
def slow_worker(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningWorker]:
    """A worker that takes seconds for a long reply, with two places and a queue of one."""
    with running(tmp_path_factory.mktemp("slow_worker"), slow_model, "--max-seqs", "2", "--max-queue", "1") as started:
        yield started
