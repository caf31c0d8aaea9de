"""llama.cpp's model and context as two Python objects with numpy in and out.

Everything that touches the C API is here, so that the rest of the worker never sees a pointer. Its rule: only the thread
that runs the decode loop calls it (llama.cpp's contexts are not thread-safe), and what is opened is closed in this order:
context, adapters, model. Runs in the worker process and in the child that proves it.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

log = logging.getLogger(__name__)

# Where the logits are, as a number: the binding's own pointer object costs ten times the call. It holds the GIL; it is brief.
_logits_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(
    ctypes.cast(llama.llama_get_logits, ctypes.c_void_p).value or 0
)

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

FLASH_ATTENTION_OFF, FLASH_ATTENTION_ON = 0, 1
KV_TYPES = {"f32": (0, 4), "f16": (1, 2)}  # name: (ggml's number, bytes a value)
DEFAULT_KV_TYPE = "f16"
LOG_LEVEL_ERROR = 4
LOG_LEVEL_CONTINUED = 5


class NativeError(RuntimeError):
    """llama.cpp refused something; the message carries what it logged."""


class NativeLog:
    """Passes llama.cpp's log lines to ours at debug, and keeps the errors for messages of our own."""

    def __init__(self) -> None:
        self._errors: list[str] = []
        callback = llama.llama_log_callback(self._receive)
        # llama.cpp keeps the pointer for the life of the process and logs through it whenever it likes; so it never dies.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(callback))
        llama.llama_log_set(callback, ctypes.c_void_p())

    def take_errors(self) -> str:
        """The error lines since the last call, joined, and forgotten."""
        errors, self._errors = self._errors, []
        return "; ".join(errors)

    def _receive(self, level: int, text: bytes, user_data: object) -> None:
        line = text.decode(errors="replace").strip()
        if not line or level == LOG_LEVEL_CONTINUED:
            return
        if level == LOG_LEVEL_ERROR and len(self._errors) < 20:
            self._errors.append(line)
        log.debug("llama.cpp: %s", line)


class Adapter:
    """A LoRA adapter in memory; `llama.cpp` scales it by its own alpha / rank."""

    def __init__(self, pointer: object) -> None:
        self.pointer: object | None = pointer

    def close(self) -> None:
        """Frees it. No open context may use it."""
        if self.pointer is not None:
            llama.llama_adapter_lora_free(self.pointer)
            self.pointer = None


class Model:
    """A GGUF model in memory."""

    def __init__(self, path: Path, native_log: NativeLog, use_extra_bufts: bool = True) -> None:
        self._log = native_log
        self._log.take_errors()
        params = llama.llama_model_default_params()
        params.use_extra_bufts = use_extra_bufts
        params.n_gpu_layers = 0
        self.pointer = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise NativeError(f"llama.cpp cannot load {path}: {self._log.take_errors() or 'no reason given'}")
        self._vocab = llama.llama_model_get_vocab(self.pointer)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self._vocab))
        self.trained_context = int(llama.llama_model_n_ctx_train(self.pointer))
        self.end_ids = frozenset(i for i in range(self.vocab_size) if llama.llama_vocab_is_eog(self._vocab, i))

    @property
    def file_type(self) -> int | None:
        """What the GGUF says most of its weights are (llama.cpp's enum llama_ftype), or None."""
        text = ctypes.create_string_buffer(16)
        length = llama.llama_model_meta_val_str(self.pointer, b"general.file_type", text, len(text))
        return int(text.value) if length > 0 and text.value.isdigit() else None

    @property
    def restorable(self) -> bool:
        """Whether the KV of a prompt serves any of its beginnings: not with a sliding window or a recurrent state."""
        windowed = int(llama.llama_model_n_swa(self.pointer)) > 0
        return not (
            windowed or llama.llama_model_is_recurrent(self.pointer) or llama.llama_model_is_hybrid(self.pointer)
        )

    def kv_bytes_per_token(self, kv_type: str = DEFAULT_KV_TYPE) -> int:
        """Bytes of KV that one position of one sequence takes (an upper bound where layers differ)."""
        heads = max(1, llama.llama_model_n_head(self.pointer))
        kv_heads = llama.llama_model_n_head_kv(self.pointer) or heads
        width = llama.llama_model_n_embd(self.pointer) * kv_heads // heads
        return int(llama.llama_model_n_layer(self.pointer) * width * 2 * KV_TYPES[kv_type][1])

    def load_adapter(self, path: Path) -> Adapter:
        """The adapter in the GGUF file at `path`; NativeError with llama.cpp's reason when it refuses."""
        self._log.take_errors()
        pointer = llama.llama_adapter_lora_init(self.pointer, str(path).encode())
        if not pointer:
            raise NativeError(self._log.take_errors() or "llama.cpp gave no reason")
        return Adapter(pointer)

    def close(self) -> None:
        """Frees it. Contexts and adapters must be closed before."""
        if self.pointer:
            llama.llama_model_free(self.pointer)
            self.pointer = None


@dataclass(frozen=True)
class ContextSize:
    """How much a context holds: `sequences` of `context` positions each, `batch` tokens at most in one decode."""

    context: int
    sequences: int
    batch: int
    kv_type: str = DEFAULT_KV_TYPE


class Context:
    """KV memory for several sequences, and the decode step over them.

    Each sequence has a stream of its own (`kv_unified` off): its numbers do not depend on where its neighbours' KV
    happens to lie, and it can always reach the whole context.
    """

    def __init__(
        self,
        model: Model,
        size: ContextSize,
        threads: int,
        flash_attention: int = FLASH_ATTENTION_OFF,
    ) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = size.context * size.sequences
        params.n_batch = params.n_ubatch = size.batch
        params.n_seq_max = size.sequences
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash_attention
        params.type_k = params.type_v = KV_TYPES[size.kv_type][0]
        params.no_perf = True
        self.size = size
        self._model = model
        self.pointer = llama.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise NativeError(f"llama.cpp cannot make a context of {size}: {model._log.take_errors()}")
        self._memory = llama.llama_get_memory(self.pointer)
        self.adapter: Adapter | None = None  # of the next decode
        self.native_cpu_s = 0.0  # CPU time of the calling thread in decode, save and restore
        self._logits: tuple[int, Floats] | None = None  # llama.cpp's buffer and where it was
        self._allocate_batch(size.batch)
        self.context = int(llama.llama_n_ctx_seq(self.pointer))

    def decode(
        self, ids: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool] | None
    ) -> Floats:
        """Runs one batch and returns the logits of the wanted rows (None: of all), in order: (wanted, vocab).

        The array is a view of llama.cpp's buffer: it holds until the next decode.
        """
        count = len(ids)
        self._ids[:count] = ids
        self._positions[:count] = positions
        self._sequences[:count] = sequences
        self._wanted[:count] = True if wanted is None else wanted
        self._batch.n_tokens = count
        before = time.thread_time()
        status = llama.llama_decode(self.pointer, self._batch)
        self.native_cpu_s += time.thread_time() - before
        if status:
            raise NativeError(f"llama_decode returned {status}: {self._model._log.take_errors()}")
        rows = count if wanted is None else sum(wanted)
        if not rows:
            return np.empty((0, self._model.vocab_size), dtype=np.float32)
        return self._buffer()[:rows]

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Makes the next decodes run under `adapter`, or under the base alone."""
        if adapter is self.adapter:
            return
        if adapter is None:
            status = llama.llama_set_adapters_lora(self.pointer, None, 0, None)
        else:
            pointers = (llama.llama_adapter_lora_p_ctypes * 1)(adapter.pointer)
            status = llama.llama_set_adapters_lora(self.pointer, pointers, 1, (ctypes.c_float * 1)(1.0))
        if status:
            raise NativeError(f"llama_set_adapters_lora returned {status}")
        self.adapter = adapter

    def clear(self, sequence: int) -> None:
        """Forgets the KV of a sequence."""
        llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def length(self, sequence: int) -> int:
        """How many positions of a sequence have KV."""
        return int(llama.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets the KV of a sequence from position `length` on."""
        llama.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def save(self, sequence: int) -> Bytes:
        """The KV of a sequence as llama.cpp writes it: as large as the positions in use."""
        before = time.thread_time()
        size = llama.llama_state_seq_get_size(self.pointer, sequence)
        blob = np.empty(size, dtype=np.uint8)
        written = llama.llama_state_seq_get_data(self.pointer, _pointer(blob), size, sequence)
        self.native_cpu_s += time.thread_time() - before
        if not size or written != size:
            raise NativeError(f"llama.cpp cannot write out sequence {sequence}: {self._model._log.take_errors()}")
        return blob

    def restore(self, sequence: int, blob: Bytes) -> None:
        """Replaces the KV of a sequence by what `save` gave, of this or of another sequence."""
        before = time.thread_time()
        read = llama.llama_state_seq_set_data(self.pointer, _pointer(blob), len(blob), sequence)
        self.native_cpu_s += time.thread_time() - before
        if read != len(blob):
            self.clear(sequence)
            raise NativeError(f"llama.cpp cannot read back sequence {sequence}: {self._model._log.take_errors()}")

    def close(self) -> None:
        """Frees it; before its adapters and its model."""
        if self.pointer:
            llama.llama_free(self.pointer)
            self.pointer = None

    def _buffer(self) -> Floats:
        address = _logits_address(self.pointer)
        if self._logits is None or self._logits[0] != address:  # llama.cpp moves it when more rows are asked for
            rows = max(self.size.batch, self.size.sequences)
            pointer = llama.llama_get_logits(self.pointer)
            self._logits = address, np.ctypeslib.as_array(pointer, shape=(rows, self._model.vocab_size))
        return self._logits[1]

    def _allocate_batch(self, size: int) -> None:
        # The C struct points into numpy arrays that we fill: no per-token ctypes call in the loop.
        self._ids: Ints = np.zeros(size, dtype=np.int32)
        self._positions: Ints = np.zeros(size, dtype=np.int32)
        self._sequences: Ints = np.zeros(size, dtype=np.int32)
        self._counts: Ints = np.ones(size, dtype=np.int32)
        self._wanted: npt.NDArray[np.int8] = np.zeros(size, dtype=np.int8)
        base = self._sequences.ctypes.data
        self._sequence_pointers = np.arange(base, base + 4 * size, 4, dtype=np.uint64)
        batch = llama.llama_batch()
        for field, array in (
            ("token", self._ids),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._sequence_pointers),
            ("logits", self._wanted),
        ):
            kind = dict(llama.llama_batch._fields_)[field]
            setattr(batch, field, ctypes.cast(array.ctypes.data, kind))
        self._batch = batch


def _pointer(blob: Bytes) -> object:
    return blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def library_version() -> str:
    """The version of llama-cpp-python and of the llama.cpp in it."""
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}, llama.cpp {llama.llama_version().decode()}"
