"""Context and memory of an engine, told before it is started, are those that the worker comes to."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bases import PreparedBase
from gateway.engines.llama_launch import LlamaLaunch
from gateway.engines.memory import OVERHEAD_BYTES, expected_memory, planned_context
from gateway.engines.spawn import WorkerFolder
from gateway.llama_worker.__main__ import default_context, parse_arguments
from gateway.settings import BaseSettings


@pytest.fixture
def base(tmp_path: Path) -> PreparedBase:
    (tmp_path / "m.gguf").write_bytes(bytes(1000))
    model = tmp_path / "m.gguf"
    return PreparedBase("a", tmp_path, model, "d", "LlamaForCausalLM", 131072, "t", (2,), kv_bytes_per_token=32768)


@pytest.mark.parametrize("trained", [256, 4096, 131072, 100_000])
@pytest.mark.parametrize("per_token", [256, 12288, 131072, 1 << 20])
@pytest.mark.parametrize("max_seqs", [1, 8, 64])
def test_the_context_is_the_one_that_the_worker_chooses(
    trained: int, per_token: int, max_seqs: int, base: PreparedBase
) -> None:
    known = replace(base, context_length=trained, kv_bytes_per_token=per_token)
    assert planned_context(known, None, max_seqs) == default_context(trained, per_token, max_seqs)


def test_a_context_that_is_asked_for_is_taken_up_to_the_models_own(base: PreparedBase) -> None:
    assert planned_context(base, 100_000, 8) == 100_000
    assert planned_context(base, 200_000, 8) == 131072
    assert planned_context(replace(base, kv_bytes_per_token=None), None, 8) == 131072


def test_the_memory_that_is_expected_grows_with_weights_and_context(base: PreparedBase) -> None:
    assert expected_memory(base, 4096, 2) == OVERHEAD_BYTES + 1000 + 2 * 4096 * 32768
    assert expected_memory(replace(base, kv_bytes_per_token=None), 4096, 2) == OVERHEAD_BYTES + 1000 + 2 * 2**30
    os.truncate(base.gguf, 5000)
    assert expected_memory(base, 1, 1) == OVERHEAD_BYTES + 5000 + 32768


def test_computed_prefixes_and_the_largest_adapters_count_too(base: PreparedBase, tmp_path: Path) -> None:
    folders = [tmp_path / str(size) for size in (10, 70, 500)]
    for folder in folders:
        folder.mkdir()
        (folder / "adapter.gguf").write_bytes(bytes(int(folder.name)))
    alone = expected_memory(base, 1, 1)
    assert expected_memory(base, 1, 1, 512, 16) == alone + 512 * 2**20
    assert expected_memory(base, 1, 1, 0, 2, [*folders, tmp_path / "gone"]) == alone + 2 * (500 + 70)


def test_the_worker_is_told_what_is_counted(tmp_path: Path, base: PreparedBase) -> None:
    launch, folder = LlamaLaunch("a", base.gguf, "d", prefix_cache_mib=7, adapters_in_memory=3), WorkerFolder(tmp_path)
    told = parse_arguments(launch.argv(folder, 0)[len(launch.command) :])
    assert (told.cache_mib, told.max_adapters) == (7, 3)
    settings, defaults = BaseSettings(), LlamaLaunch("a", base.gguf, "d")
    assert (defaults.prefix_cache_mib, defaults.adapters_in_memory) == (
        settings.prefix_cache_mib,
        settings.adapters_in_memory,
    )
    bare = parse_arguments([*launch.argv(folder, 0)[len(launch.command) :][:8]])
    assert (bare.cache_mib, bare.max_adapters) == (defaults.prefix_cache_mib, defaults.adapters_in_memory)
