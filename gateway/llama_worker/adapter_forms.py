"""An adapter's file in the two forms in which its numbers do not depend on how many sequences share a step.

ggml multiplies one row by a dot product and several rows by tinyBLAS, which sum in different orders; the tiny difference
flips roundings of the quantised activations that follow and ends as logits some 1e-1 apart. A prompt chunk has several
rows always, so the file as it is will do: the prompt form. A decode step has one row or several, as the load has it:
the decode form keeps tinyBLAS away. That declines a matrix whose inner size is not a multiple of its vector and whose outer
size is not one of 4, so one zero row on a rank that 4 divides does it. llama.cpp scales by alpha / rank: B makes up for
the longer rank.

What it costs, rank 16 on all projections of a 200M-parameter model: decode steps of two sequences or more 8% (200 against
216 tokens/s at eight), one alone nothing. Prompts through the decode form would lose 19% (388 against 480 tokens/s), so
they get the other; the price is a second copy in memory.

Making the decode form takes as long as several steps, so another thread does it and the loop only has llama.cpp load it. That
must be the loop's own thread: llama.cpp counts the adapters of a model whenever a decode follows a change of adapters, and
writes to the same set when it loads or frees one. It takes 5 to 8 ms for rank 16 on a 200M-parameter model, 30 to 40 ms for 1B,
about as long as a step takes there.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gateway.errors import TunegateError
from gateway.llama_worker.native import Adapter, Model, NativeError

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
PLAIN_TYPES = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}


class Forms:
    """One adapter in memory: the prompt form at once, the decode form when it is first asked for."""

    def __init__(self, model: Model, path: Path, two: bool = True) -> None:
        """NativeError when llama.cpp refuses the file, OSError when it cannot be read. Without `two` one form serves both."""
        self._model = model
        self._path = path
        self._identity = identity(path)
        self.for_prompts = model.load_adapter(path)
        self._for_decoding: Adapter | None = None if two else self.for_prompts
        self._padding: Future[int | None] | None = None

    def prepare(self, thread: Executor) -> None:
        """Begins to make the decode form's file on another thread, where that was not done yet."""
        if self._for_decoding is None and self._padding is None:
            self._padding = thread.submit(_padded_file, self._path, self._identity)

    @property
    def prepared(self) -> bool:
        """Whether `for_decoding` has nothing to wait for."""
        return self._padding is None or self._padding.done()

    @property
    def for_decoding(self) -> Adapter:
        """The form for steps of one row a sequence; TunegateError when the file is gone or another."""
        if self._for_decoding is None:
            try:
                padded = self._padding.result() if self._padding else _padded_file(self._path, self._identity)
                self._for_decoding = self._load(padded) if padded is not None else self.for_prompts
            except (NativeError, OSError, ValueError, LookupError) as error:
                raise TunegateError(f"The adapter's file {self._path} cannot be read again: {error}") from None
            finally:
                self._padding = None
        return self._for_decoding

    def owns(self, adapter: Adapter | None) -> bool:
        """Whether `adapter` is one of the two."""
        return adapter is not None and (adapter is self.for_prompts or adapter is self._for_decoding)

    def close(self) -> None:
        """Frees both. No open context may use them."""
        self.for_prompts.close()  # closing twice is harmless, where one form serves both
        if self._for_decoding is not None:
            self._for_decoding.close()
        if self._padding is not None:
            self._padding.add_done_callback(_forget)

    def _load(self, padded: int) -> Adapter:
        try:
            return self._model.load_adapter(Path(f"/proc/self/fd/{padded}"))
        finally:
            os.close(padded)


def identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and time of the last change of a file."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_through(path: Path) -> None:
    """Has the system read a whole file, so that whoever opens it next need not wait for a disk; OSError."""
    with path.open("rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass


def _padded_file(path: Path, known: tuple[int, ...]) -> int | None:
    """The decode form as an open file in memory, or None where the file itself will do or cannot be padded. For any thread."""
    if identity(path) != known:
        raise TunegateError(f"The adapter's file {path} has changed since it was loaded.")
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if any(tensor.tensor_type not in PLAIN_TYPES for tensor in tensors.values()):
        log.warning(
            "%s holds quantised tensors: its numbers may differ slightly between one and several sequences", path
        )
        return None
    alpha = _field(reader, "adapter.lora.alpha", 0.0)
    target = os.memfd_create("adapter", os.MFD_CLOEXEC)  # in memory: nothing is left behind by a kill
    try:
        writer = gguf.GGUFWriter(f"/proc/self/fd/{target}", _field(reader, "general.architecture", ""))
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            values = np.asarray(tensor.data)
            if name.endswith((".lora_a", ".lora_b")):
                values = _pad(name, values, scaled_by_rank=alpha != 0)
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except BaseException:
        os.close(target)
        raise
    return target


def _forget(padding: Future[int | None]) -> None:
    if padding.exception() is None and (padded := padding.result()) is not None:
        os.close(padded)


def _pad(name: str, values: npt.NDArray[np.float32 | np.float16], scaled_by_rank: bool) -> npt.NDArray[np.float32]:
    # A is (rank, in) and B (out, rank), but for the token embedding, where A is (vocab, rank).
    axis = 0 if name.endswith(".lora_a") and not name.startswith("token_embd.") else 1
    rank = values.shape[axis]
    padded = values.astype(np.float32)
    if rank % 4:
        return padded
    padded = np.pad(padded, [(0, 1 if index == axis else 0) for index in range(2)])
    if name.endswith(".lora_b") and scaled_by_rank:
        padded *= np.float32((rank + 1) / rank)
    return padded


def _field(reader: gguf.GGUFReader, name: str, default: Any) -> Any:
    found = reader.get_field(name)
    return default if found is None else found.contents()
