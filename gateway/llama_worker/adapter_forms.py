"""An adapter in the form in which its numbers do not depend on how many sequences share a step.

ggml multiplies one row by a dot product and several rows by tinyBLAS, which sum in different orders; the tiny difference
flips roundings of the quantised activations that follow and ends as logits some 1e-1 apart. Two forms avoid that:

- eight bits (Q8_0), under quantised weights, for prompts and decode steps alike: the two kernels sum the same blocks in the
  same order. Activations are rounded to eight bits, as they are before all the other weights, and the rank is filled up
  with zeros to a whole block;
- an odd rank, under weights that are not quantised, where eight bits would be the coarsest thing in the model, and for decode
  steps alone, since a prompt chunk has several rows always: tinyBLAS declines a matrix whose inner size is not a multiple of
  its vector and whose outer size is not one of 4, so one zero row on a rank that 4 divides keeps it away. Prompts would lose
  a fifth of their speed, so they get the file as it is.

llama.cpp scales by alpha / rank: B makes up for the longer rank.

What they cost, rank 16 on all projections of a 200M-parameter q4_0 model, two cores, ms a decode step of 1 and of 8
sequences: the base alone 7.4 and 35.7, the file as it is 9.7 and 38.9, eight bits 9.3 and 38.7, the odd rank 9.8 and 43.6
(with rank 32 10.7 and 53.0). What eight bits change, as the mean error of a log-probability beside the same weights and
adapter in f32 (`python -m tests.bench.llama_worker.bits`): 0.0233 as it is and 0.0235 in eight bits with an adapter that
moves them by 0.33, 0.0246 and 0.0268 with one that moves them by 0.93, 0.0374 and 0.0752 by 1.97; the base alone 0.0234.

Making a form takes as long as several steps (0.1 s there), so another thread does it and the loop only has llama.cpp load it.
That must be the loop's own thread: llama.cpp counts the adapters of a model whenever a decode follows a change of adapters,
and writes to the same set when it loads or frees one. It takes 5 to 8 ms for a file of rank 16 on a 200M-parameter model, 30
to 40 ms for 1B, about as long as a step takes there.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from gateway.errors import TunegateError
from gateway.llama_worker.native import Adapter, Model, NativeError
from gateway.llama_worker.steady import AdapterForm

log = logging.getLogger(__name__)

READ_BYTES = 1 << 20
EIGHT_BITS = gguf.GGMLQuantizationType.Q8_0
LARGEST_B = 1024.0
BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[EIGHT_BITS]
PLAIN_TYPES = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}


@dataclass(frozen=True)
class ReadFile:
    """An adapter's file as it was when it was read, and the file of the form that was made of it, if one was."""

    identity: tuple[int, ...]
    made: bytes | None


class Forms:
    """One adapter in memory."""

    def __init__(self, model: Model, path: Path, kind: AdapterForm, made: bytes | None = None) -> None:
        """`made` is of eight bits, where that is the kind and it could be made; without it the file serves as it is.

        NativeError when llama.cpp refuses the file, OSError when it cannot be read.
        """
        self._model = model
        self._path = path
        self._identity = identity(path)
        self.for_prompts = model.load_adapter(path) if made is None else self._load(made)
        self._for_decoding: Adapter | None = None if kind is AdapterForm.ODD_RANK else self.for_prompts
        self._making: Future[bytes | None] | None = None

    def prepare(self, thread: Executor) -> None:
        """Begins to make the decode form on another thread, where there is to be one and that was not done yet."""
        if self._for_decoding is None and self._making is None:
            self._making = thread.submit(_form, self._path, self._identity, AdapterForm.ODD_RANK)

    @property
    def prepared(self) -> bool:
        """Whether `for_decoding` has nothing to wait for."""
        return self._making is None or self._making.done()

    @property
    def for_decoding(self) -> Adapter:
        """The form for steps of one row a sequence; TunegateError when the file is gone or another."""
        if self._for_decoding is None:
            try:
                making = self._making
                made = making.result() if making else _form(self._path, self._identity, AdapterForm.ODD_RANK)
                self._for_decoding = self.for_prompts if made is None else self._load(made)
            except (NativeError, OSError, ValueError, LookupError) as error:
                raise TunegateError(f"The adapter's file {self._path} cannot be read again: {error}") from None
            finally:
                self._making = None
        return self._for_decoding

    def owns(self, adapter: Adapter | None) -> bool:
        """Whether `adapter` is one of the two."""
        return adapter is not None and (adapter is self.for_prompts or adapter is self._for_decoding)

    def close(self) -> None:
        """Frees both. No open context may use them."""
        self.for_prompts.close()  # closing twice is harmless, where one form serves both
        if self._for_decoding is not None:
            self._for_decoding.close()

    def _load(self, made: bytes) -> Adapter:
        with _in_memory() as file:
            file.write(made)
            file.flush()
            return self._model.load_adapter(Path(f"/proc/self/fd/{file.fileno()}"))


def read(path: Path, kind: AdapterForm) -> ReadFile:
    """Has the system read a whole file, so that whoever opens it next need not wait for a disk, and makes its form. OSError.

    For any thread. A file that no form can be made of is left to llama.cpp, which says what is wrong with it.
    """
    known = identity(path)
    with path.open("rb", buffering=0) as file:
        while file.read(READ_BYTES):
            pass
    if kind is not AdapterForm.EIGHT_BITS:
        return ReadFile(known, None)
    try:
        return ReadFile(known, _form(path, known, kind))
    except Exception as error:  # whatever a file of somebody else's leads gguf to
        log.warning("%s is used as it is, since it cannot be brought to eight bits: %r", path, error)
        return ReadFile(known, None)


def identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and time of the last change of a file."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _form(path: Path, known: tuple[int, ...], kind: AdapterForm) -> bytes | None:
    """The form as a file's content, or None where the file itself will do or cannot be changed. For any thread."""
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
    raised = _exponent(tensors) if kind is AdapterForm.EIGHT_BITS and alpha else 0
    with _in_memory() as file:
        writer = gguf.GGUFWriter(f"/proc/self/fd/{file.fileno()}", _field(reader, "general.architecture", ""))
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha * 2.0**-raised)
        for name, tensor in tensors.items():
            values = np.asarray(tensor.data)
            if name.endswith((".lora_a", ".lora_b")):
                values = _with_rank(name, values, kind, scaled_by_rank=alpha != 0)
            if name.endswith(".lora_b"):
                values *= np.float32(2.0**raised)
            if kind is AdapterForm.EIGHT_BITS and _is_factor(name) and values.shape[1] % BLOCK == 0:
                writer.add_tensor(name, _eight_bits(values), raw_dtype=EIGHT_BITS)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return file.read()


def _in_memory() -> BinaryIO:
    """A file without a name: nothing is left behind by a kill."""
    return os.fdopen(os.memfd_create("adapter", os.MFD_CLOEXEC), "w+b")


def _eight_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Rows of Q8_0 blocks: a 16-bit float that a block is multiplied by, and its 32 numbers.

    gguf's own does the same and takes 0.3 s for an adapter for which this takes some 0.05.
    """
    blocks = values.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    packed = np.empty((len(blocks), BLOCK_BYTES), dtype=np.uint8)
    packed[:, :2] = scales.astype(np.float16).view(np.uint8)
    with np.errstate(invalid="ignore"):  # of a NaN, which its scale tells
        whole = np.rint(blocks / np.where(scales > 0, scales, 1))
        packed[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return packed.reshape(len(values), -1)


def _exponent(tensors: Mapping[str, Any]) -> int:
    """By which power of two B is multiplied: a block's scale is a 16-bit float, too coarse for a B that is hardly trained."""
    largest = max(
        (float(np.abs(each.data).max()) for name, each in tensors.items() if name.endswith(".lora_b")), default=0
    )
    return math.floor(math.log2(LARGEST_B / largest)) if 0 < largest < math.inf else 0


def _is_factor(name: str) -> bool:
    """Whether a tensor is multiplied by activations: all but the A of the token embedding, whose rows are looked up."""
    return name.endswith((".lora_a", ".lora_b")) and name != "token_embd.weight.lora_a"


def _with_rank(
    name: str, values: npt.NDArray[np.float32 | np.float16], kind: AdapterForm, scaled_by_rank: bool
) -> npt.NDArray[np.float32]:
    # A is (rank, in) and B (out, rank), but for the token embedding, where A is (vocab, rank).
    axis = 0 if name.endswith(".lora_a") and not name.startswith("token_embd.") else 1
    rank = values.shape[axis]
    more = -rank % BLOCK if kind is AdapterForm.EIGHT_BITS else int(rank % 4 == 0)
    padded = np.pad(values.astype(np.float32), [(0, more if index == axis else 0) for index in range(2)])
    if name.endswith(".lora_b") and scaled_by_rank:
        padded *= np.float32((rank + more) / rank)
    return padded


def _field(reader: gguf.GGUFReader, name: str, default: Any) -> Any:
    found = reader.get_field(name)
    return default if found is None else found.contents()
