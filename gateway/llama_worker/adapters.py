"""The adapters in memory, by name. A name means one adapter for as long as it is loaded.

Loading and freeing happen on the decode loop's thread, between steps. An unload takes effect at once for new requests and
frees the adapter when the last sequence that uses it has ended.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from gateway.errors import NotFound, RequestError
from gateway.llama_worker.native import Adapter, Model, NativeError

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.gguf"


class Adapters:
    """Loads adapters for one model and knows them by name."""

    def __init__(self, model: Model, served_name: str) -> None:
        self._model = model
        self._served_name = served_name
        self._loaded: dict[str, tuple[Adapter, Path]] = {}
        self._leaving: dict[str, Adapter] = {}

    def names(self) -> dict[str, Path]:
        """The names that requests may use, and where each came from. For any thread."""
        return {name: path for name, (_, path) in list(self._loaded.items())}  # a copy: the other thread may add one

    def get(self, name: str) -> Adapter | None:
        """The adapter of a name, or None when there is none (any more)."""
        found = self._loaded.get(name)
        return found[0] if found else None

    def load(self, name: str, directory: str | None) -> None:
        """Loads DIRECTORY/adapter.gguf under `name`; RequestError (400, or 404 when there is no such file)."""
        if name == self._served_name or name in self._loaded or name in self._leaving:
            raise RequestError(
                f"lora_name is {name!r}, which is taken; a name is never reused while it is loaded.", param="lora_name"
            )
        path = _adapter_path(directory)
        try:
            self._model.load_adapter(path).close()  # llama.cpp validates the file before we read a byte of it
            adapter = _load_repeatable(self._model, path)
        except NativeError as error:
            raise RequestError(f"llama.cpp refused {path}: {error}", param="lora_path") from None
        self._loaded[name] = (adapter, path.parent)
        log.info("adapter %r loaded from %r", name, str(path))

    def withdraw(self, name: str) -> Adapter:
        """Takes `name` from new requests; the adapter is freed by `free` once unused. NotFound when it is unknown."""
        found = self._loaded.pop(name, None)
        if found is None:
            raise NotFound(f"lora_name is {name!r}; no adapter of that name is loaded.", param="lora_name")
        self._leaving[name] = found[0]
        return found[0]

    def free(self, name: str) -> None:
        """Frees a withdrawn adapter that nothing uses."""
        self._leaving.pop(name).close()
        log.info("adapter %r unloaded", name)

    def close(self) -> None:
        """Frees them all."""
        for adapter in [adapter for adapter, _ in self._loaded.values()] + list(self._leaving.values()):
            adapter.close()
        self._loaded.clear()
        self._leaving.clear()


def _adapter_path(directory: str | None) -> Path:
    if not directory or "\0" in directory or not os.path.isabs(directory):
        raise RequestError(f"lora_path is {directory!r}; it must be an absolute directory.", param="lora_path")
    path = Path(directory) / ADAPTER_FILE
    if not path.is_file():
        raise NotFound(f"lora_path is {directory!r}; there is no {ADAPTER_FILE} in it.", param="lora_path")
    return path


def _load_repeatable(model: Model, path: Path) -> Adapter:
    """The adapter at `path` with ranks that make its numbers independent of how many sequences share a step.

    ggml multiplies one row by a dot product and several rows by tinyBLAS, which sum in different orders; the tiny
    difference flips roundings of the quantised activations that follow and ends as logits some 1e-1 apart. tinyBLAS
    declines a matrix whose inner size is not a multiple of its vector and whose outer size is not one of 4, so one
    zero row on a rank that 4 divides keeps every step on the dot product. llama.cpp scales by alpha / rank: B makes
    up for the longer rank.
    """
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    plain = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
    if any(tensor.tensor_type not in plain for tensor in tensors.values()):
        log.warning(
            "%s holds quantised tensors: its numbers may differ slightly between one and several sequences", path
        )
        return model.load_adapter(path)
    alpha = _field(reader, "adapter.lora.alpha", 0.0)
    target = os.memfd_create("adapter", os.MFD_CLOEXEC)  # in memory: nothing is left behind by a kill
    try:
        copy = f"/proc/self/fd/{target}"
        writer = gguf.GGUFWriter(copy, _field(reader, "general.architecture", ""))
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
        return model.load_adapter(Path(copy))
    finally:
        os.close(target)


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
