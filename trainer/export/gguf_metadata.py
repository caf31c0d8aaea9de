"""What stands before the weights in a GGUF file, read in one go: its metadata and what tensors it has.

The gguf package's reader makes a numpy array of every string of a vocabulary, which takes a minute for the largest; this
takes a second. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.export.tensors import UnsupportedModel

TEMPLATE_KEY = "tunegate.template"  # template.json, in a file that was exported from here
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    _BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_ALIGNMENT = 32
_LIMIT_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header tells of it."""

    shape: tuple[int, ...]  # rows first, as numpy has it
    kind: int  # ggml's number of its type
    at: int  # where its data begins in the file, in bytes


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key with its value; arrays are lists. Raises UnsupportedModel when it is no GGUF file."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The metadata, and the tensors by name. Raises UnsupportedModel when it is no GGUF file."""
    with path.open("rb") as file:
        data = file.read(_LIMIT_BYTES)
    try:
        magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", data)
        if magic != _MAGIC or version not in _VERSIONS:
            raise UnsupportedModel(f"{path.name} is no GGUF file of version 2 or 3")
        found: dict[str, Any] = {}
        at = 24
        for _ in range(n_keys):
            key, at = _string(data, at)
            (kind,) = struct.unpack_from("<I", data, at)
            found[key], at = _value(data, at + 4, kind)
        return found, _tensors(data, at, n_tensors, int(found.get("general.alignment", _ALIGNMENT)))
    except (struct.error, ValueError, KeyError, IndexError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise UnsupportedModel(f"{path.name} is cut off or damaged in its metadata ({error})") from error


def _tensors(data: bytes, at: int, count: int, alignment: int) -> dict[str, TensorInfo]:
    raw: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        raw[name] = (tuple(reversed(shape)), kind, offset)
        at += 16 + 8 * dimensions
    start = -(-at // alignment) * alignment
    return {name: TensorInfo(shape, kind, start + offset) for name, (shape, kind, offset) in raw.items()}


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        return _numbers(data, at, kind, 1)[0][0], at + np.dtype(_NUMBERS[kind]).itemsize
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _NUMBERS:
        return _numbers(data, at, kind, count)
    values = []
    for _ in range(count):
        value, at = _value(data, at, kind)
        values.append(value)
    return values, at


def _numbers(data: bytes, at: int, kind: int, count: int) -> tuple[list[Any], int]:
    dtype = np.dtype(_NUMBERS[kind])
    return np.frombuffer(data, dtype, count, at).tolist(), at + count * dtype.itemsize


def _string(data: bytes, at: int) -> tuple[str, int]:
    (size,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + size
    if end > len(data):
        raise ValueError("a text goes on after the end of the file")
    return data[at + 8 : end].decode("utf-8", "replace"), end


def chat_templates(path: Path) -> str | dict[str, str] | None:
    """The chat template that a GGUF brings; several by name where it brings several."""
    found = read_metadata(path)
    default = found.get("tokenizer.chat_template")
    named = {name: found.get(f"tokenizer.chat_template.{name}") for name in found.get("tokenizer.chat_templates", [])}
    texts = {name: text for name, text in {"default": default, **named}.items() if isinstance(text, str)}
    return texts if len(texts) > 1 else next(iter(texts.values()), None)


def kv_bytes_per_token(metadata: dict[str, Any]) -> int | None:
    """What keys and values of one token take in float16, all layers together; None where the metadata does not tell."""
    architecture = metadata.get("general.architecture")

    def read(key: str) -> Any:
        return metadata.get(f"{architecture}.{key}")

    layers, heads = read("block_count"), read("attention.head_count")
    if not isinstance(layers, int) or not isinstance(heads, int) or not isinstance(read("embedding_length"), int):
        return None
    kv_heads = read("attention.head_count_kv") or heads
    by_layer = kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers
    head_size = read("embedding_length") // heads
    sizes = (read("attention.key_length") or head_size) + (read("attention.value_length") or head_size)
    return int(sum(by_layer) * sizes * 2)
