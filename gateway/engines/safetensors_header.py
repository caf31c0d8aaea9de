"""The header of a safetensors file, read as if an attacker had written it: every length is checked before it is used.

    u64 little-endian: length of the header | header: JSON | data

Reads at most a megabyte, whatever the file says of itself. Pure but for the reading.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 10_000
MAX_NAME_LENGTH = 512
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class HeaderError(ValueError):
    """The file is not safetensors as we accept it; the message says where."""


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    begin: int  # byte offset in the data
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors by name, proven to fill the file's data without gap or overlap; HeaderError otherwise."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise HeaderError(
                f"the header is said to have {length} bytes in a file of {size}; at most {MAX_HEADER_BYTES} are allowed"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("the header is not a JSON object")
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise HeaderError(f"it holds {len(header)} tensors; at most {MAX_TENSORS} are allowed")
    tensors = {name: _tensor(name, entry) for name, entry in header.items()}
    _check_layout(tensors, size - 8 - length)
    return tensors


def _tensor(name: str, entry: Any) -> Tensor:
    if len(name) > MAX_NAME_LENGTH:
        raise HeaderError(f"a tensor's name has {len(name)} characters; at most {MAX_NAME_LENGTH} are allowed")
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise HeaderError(f"tensor {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderError(f"tensor {name!r} has the unknown data type {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or len(shape) > 8:
        raise HeaderError(f"tensor {name!r} has the shape {str(shape)[:80]}; it must be at most 8 positive integers")
    if not _is_offsets(offsets):
        raise HeaderError(f"tensor {name!r} has the data_offsets {str(offsets)[:80]}; they must be two integers")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise HeaderError(f"tensor {name!r} has {offsets[1] - offsets[0]} bytes, which {dtype} {shape} does not fill")
    return Tensor(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(tensors: dict[str, Tensor], data_bytes: int) -> None:
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin != at:
            raise HeaderError(f"tensor {name!r} begins at byte {tensor.begin} of the data instead of {at}")
        at = tensor.end
    if at != data_bytes:
        raise HeaderError(f"the tensors take {at} bytes, but the file holds {data_bytes}")


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("__metadata__ must hold strings only")


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 < size < 1 << 40 for size in value)


def _is_offsets(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(at) is int and 0 <= at < 1 << 62 for at in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise HeaderError("the header names something twice")
    return value


def _refuse_constant(constant: str) -> None:
    raise HeaderError(f"the header holds {constant}")
