"""Log-probabilities straight from llama.cpp, with no code of ours between: the judge of what the trainer exports."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


@contextmanager
def llama_model(gguf_path: Path) -> Iterator[Any]:
    """A loaded model. Without extra buffer types: AMX ones crash in some builds (see the worker)."""
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(gguf_path).encode(), params)
    assert model, f"llama.cpp does not load {gguf_path}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def reply_logprobs(
    model: Any, prompt: list[int], reply: list[int], adapter_path: Path | None = None, n_ctx: int = 512
) -> np.ndarray:
    """The log-probability of each reply id; shape (reply,)."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
    params.n_threads = params.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, params)
    adapter = None
    if adapter_path is not None:
        adapter = llama_cpp.llama_adapter_lora_init(model, str(adapter_path).encode())
        assert adapter, f"llama.cpp does not load {adapter_path}"
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
    try:
        return _decode(model, context, prompt, reply)
    finally:
        llama_cpp.llama_free(context)
        if adapter is not None:
            llama_cpp.llama_adapter_lora_free(adapter)


def _decode(model: Any, context: Any, prompt: list[int], reply: list[int]) -> np.ndarray:
    ids = prompt + reply
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = 1
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = []
    for place in range(len(prompt), len(ids)):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place - 1), (size,)).astype(np.float64)
        found.append(logits[ids[place]] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    llama_cpp.llama_batch_free(batch)
    return np.array(found)
