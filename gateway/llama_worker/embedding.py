"""Ids → one vector, for models whose GGUF says how they pool. On the decode loop's thread, a chunk between two rounds.

llama.cpp pools only what lies in one batch, and one batch of a long text would hold up every stream. So the hidden states are
taken as they are, chunk by chunk as prompts are, and pooled here. Where a model looks both ways, its text is one chunk.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from gateway.llama_worker.native import FLASH_ATTENTION_OFF, Model, NativeError

Vector = npt.NDArray[np.float32]

CHUNK = 64
MEAN, CLS, LAST = 1, 2, 3
_NAMES = {MEAN: "mean", CLS: "cls", LAST: "last"}


@dataclass(eq=False)
class EmbeddingJob:
    """Texts to be embedded; `vectors` grows as they are done. `given_up` ends it at its next chunk."""

    inputs: Sequence[Sequence[int]]
    vectors: list[Vector] = field(default_factory=list)
    given_up: bool = False


class Embedder:
    """Embeds with `model`. Its context is made when the first text comes, and is used by one job at a time."""

    def __init__(self, model: Model, context: int, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._pooling = _number(model, "pooling_type")
        self._causal = _number(model, "attention.causal", "true") != 0
        self.width = int(llama.llama_model_n_embd(model.pointer))
        self.longest = context
        self._context: object | None = None

    @property
    def pooling(self) -> str | None:
        """How the model pools, or None when it makes no embeddings."""
        return _NAMES.get(self._pooling)

    def steps(self, job: EmbeddingJob) -> Iterator[bool]:
        """Does the job, yielding after each chunk whether a text is done: only there may another job's steps come between.

        Raises NativeError.
        """
        for ids in job.inputs:
            pooled = np.zeros(self.width, dtype=np.float64)
            for start in range(0, len(ids), self._chunk):
                if job.given_up:
                    return
                states = self._decode(ids[start : start + self._chunk], fresh=start == 0)  # (tokens, width)
                if self._pooling == MEAN:
                    pooled += states.sum(axis=0, dtype=np.float64)
                elif self._pooling == LAST or start == 0:
                    pooled[:] = states[-1 if self._pooling == LAST else 0]
                if start + self._chunk < len(ids):
                    yield False
            job.vectors.append((pooled / (np.linalg.norm(pooled) or 1.0)).astype(np.float32))
            yield True

    def close(self) -> None:
        """Frees the context; before the model is freed."""
        if self._context is not None:
            llama.llama_free(self._context)
            self._context = None

    @property
    def _chunk(self) -> int:
        return CHUNK if self._causal else self.longest

    def _decode(self, ids: Sequence[int], fresh: bool) -> Vector:
        context = self._opened()
        memory = llama.llama_get_memory(context)
        if fresh and memory:  # an encoder keeps none
            llama.llama_memory_clear(memory, False)
        tokens = np.array(ids, dtype=np.int32)
        batch = llama.llama_batch_get_one(tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(tokens))
        status = llama.llama_decode(context, batch)
        if status:
            raise NativeError(f"llama_decode returned {status} for an embedding")
        found = llama.llama_get_embeddings(context)
        if not found:
            raise NativeError("llama.cpp gave no embeddings")
        return np.ctypeslib.as_array(found, shape=(len(tokens), self.width)).copy()

    def _opened(self) -> object:
        if self._context is None:
            params = llama.llama_context_default_params()
            params.n_ctx = self.longest
            params.n_batch = params.n_ubatch = self._chunk
            params.n_seq_max = 1
            params.embeddings = True
            params.pooling_type = 0  # none: the states as they are
            params.n_threads = params.n_threads_batch = self._threads
            params.flash_attn_type = FLASH_ATTENTION_OFF
            params.no_perf = True
            self._context = llama.llama_init_from_model(self._model.pointer, params)
            if not self._context:
                raise NativeError("llama.cpp cannot make a context for embeddings")
        return self._context


def _number(model: Model, key: str, true_word: str = "") -> int:
    """A metadata value of the model's architecture: 0 when there is none, 1 for `true_word` (or none where one is named)."""
    architecture = _metadata(model, "general.architecture")
    value = _metadata(model, f"{architecture}.{key}")
    if true_word:
        return int(value in ("", true_word))
    return int(value) if value.isdigit() else 0


def _metadata(model: Model, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    size = llama.llama_model_meta_val_str(model.pointer, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if size >= 0 else ""
