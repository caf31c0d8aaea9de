"""How much context an engine gets and what memory it is expected to take, known before it is started. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gateway.bases import PreparedBase

OVERHEAD_BYTES = 256 << 20  # of a worker beside weights, keys and values
KV_BUDGET_BYTES = 2 << 30  # for keys and values of all sequences, where no context length is set; the worker's own rule
SMALLEST_CONTEXT = 512
FORMS = 2  # of an adapter in memory, at most: one for prompts, one for the steps after them


def planned_context(base: PreparedBase, asked: int | None, max_seqs: int) -> int:
    """Tokens of context a sequence: as many as asked for, else the model's own, halved until all sequences fit the budget.

    The worker would come to the same number by itself; here it is needed before there is a worker.
    """
    if asked is not None:
        return min(asked, base.context_length)
    context = base.context_length
    while context > SMALLEST_CONTEXT and context * max_seqs * (base.kv_bytes_per_token or 0) > KV_BUDGET_BYTES:
        context //= 2
    return context


def expected_memory(
    base: PreparedBase,
    context: int,
    max_seqs: int,
    prefix_cache_mib: int = 0,
    adapters_in_memory: int = 0,
    adapters: Iterable[Path] = (),
) -> int:
    """What an engine is expected to take, in bytes: weights, keys and values, computed prefixes, adapters, the process itself.

    `adapters` are the folders of those that are known when it starts; the largest count, as many as are in memory at once.
    Blocks for as long as it takes to look at their sizes.
    """
    per_token = base.kv_bytes_per_token
    kv_bytes = KV_BUDGET_BYTES if per_token is None else per_token * context * max_seqs
    files = [base.gguf] if base.gguf else list((base.hf or base.path).glob("*.safetensors"))
    weights_bytes = sum(file.stat().st_size for file in files)
    largest = sorted(map(_size, adapters), reverse=True)[:adapters_in_memory]
    kept_bytes = (prefix_cache_mib << 20) + FORMS * sum(largest)
    return weights_bytes + kv_bytes + kept_bytes + OVERHEAD_BYTES


def _size(adapter: Path) -> int:
    try:
        return (adapter / "adapter.gguf").stat().st_size
    except OSError:  # it is refused when it is loaded
        return 0
