"""What is exported says what the adapter said in training: the adapter's own witness, asked of the files that were written.

Place in the flow: after the last byte is written, before anything takes its final name. One rule: the files are read back by
the programs that will read them, llama.cpp and transformers. What an adapter's witness.json holds is what base + adapter say,
as the trainer saw it on the very weights that are served.
"""

from __future__ import annotations

import ctypes
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.export.tensors import UnsupportedModel

FLOOR = 0.01  # nats a token: what two programs' arithmetic differs by on the same weights
# How far off an export may be, as a part of what the adapter does. Measured on the demo model (adapters of 3 to 4 nats a
# token): f32 1e-6, f16 0.001, bf16 0.005, q8_0 0.02 to 0.05, q6_k 0.03 to 0.11, q5_0 0.08 to 0.19, q4_0 0.15 to 0.40.
TOLERANCES = {"f32": 0.01, "f16": 0.02, "bf16": 0.1}
LOSSY_TOLERANCE = 1.0  # then the rounding does as much as the training did
TELLING = 0.1  # above it, it is said to be rounding worth a thought


@dataclass(frozen=True)
class Item:
    """A prompt, a reply, and the reply's log-probabilities under the base and under base + adapter."""

    prompt: list[int]
    reply: list[int]
    base: list[float]
    tuned: list[float]


@dataclass(frozen=True)
class Proof:
    """Root mean squares over all tokens, in nats."""

    tokens: int
    effect: float  # of the adapter: tuned − base
    error: float  # exported − tuned


def read_items(witness: Path) -> list[Item]:
    raw = json.loads(witness.read_bytes())["items"]
    names = ("prompt_ids", "reply_ids", "base_logprobs", "tuned_logprobs")
    return [Item(*(item[name] for name in names)) for item in raw]


def judge(items: list[Item], found: list[list[float]], kind: str) -> Proof:
    """How far the exported model is from the tuned one. UnsupportedModel where that is more than its type explains."""
    got = np.concatenate([np.array(values) for values in found])
    tuned = np.concatenate([np.array(item.tuned) for item in items])
    base = np.concatenate([np.array(item.base) for item in items])
    proof = Proof(len(tuned), _root_mean_square(tuned - base), _root_mean_square(got - tuned))
    limit = TOLERANCES.get(kind, LOSSY_TOLERANCE) * proof.effect + FLOOR
    if not proof.error <= limit:  # also where it is no number
        told = (
            f"the exported model is {proof.error:.3f} nats a token away from base + adapter, whose effect is "
            f"{proof.effect:.3f}; up to {limit:.3f} is what {kind} explains. Nothing was exported"
        )
        if kind not in TOLERANCES:
            told += f". Rounding to {kind} undoes what was trained: take q8_0 or f16"
        raise UnsupportedModel(told)
    return proof


def score_gguf(path: Path, items: list[Item], threads: int) -> list[list[float]]:
    """The replies' log-probabilities, by llama.cpp itself. Raises UnsupportedModel when it does not load the file."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    try:
        return _score(llama_cpp, path, items, threads)
    finally:
        llama_cpp.llama_log_set(ctypes.cast(0, llama_cpp.llama_log_callback), ctypes.c_void_p(0))


def score_checkpoint(folder: Path, items: list[Item]) -> list[list[float]]:
    """The same of a Hugging Face folder, by transformers, in float32."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    found = []
    with torch.inference_mode():
        for item in items:
            ids = torch.tensor([item.prompt + item.reply])
            logits = model.eval()(ids, use_cache=False, logits_to_keep=len(item.reply) + 1).logits[0, :-1]
            chosen = logits.float().log_softmax(-1).gather(1, ids[0, len(item.prompt) :, None])
            found.append([float(value) for value in chosen[:, 0]])
    return found


def _score(llama_cpp: Any, path: Path, items: list[Item], threads: int) -> list[list[float]]:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False  # AMX ones crash in some builds
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise UnsupportedModel(f"llama.cpp does not load {path.name}")
    try:
        room = max(len(item.prompt) + len(item.reply) for item in items)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = room
        settings.n_threads = settings.n_threads_batch = threads
        context = llama_cpp.llama_init_from_model(model, settings)
        if not context:
            raise UnsupportedModel(f"llama.cpp has no room for {room} tokens of {path.name}")
        try:
            return [_decode(llama_cpp, model, context, item) for item in items]
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)


def _decode(llama_cpp: Any, model: Any, context: Any, item: Item) -> list[float]:
    """In a context that was emptied of what came before."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    ids = item.prompt + item.reply
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = place >= len(item.prompt) - 1
    failed = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_batch_free(batch)
    if failed:
        raise UnsupportedModel(f"llama.cpp could not compute with the exported file (error {failed})")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = []
    for place in range(len(item.prompt), len(ids)):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, place - 1), (size,)).astype(np.float64)
        highest = logits.max()
        found.append(float(logits[ids[place]] - highest - np.log(np.exp(logits - highest).sum())))
    return found


def _root_mean_square(values: Any) -> float:
    return math.sqrt(float(np.mean(values * values)))
