"""What W&B wrote offline: LevelDB's log format with protobufs in it, for which wandb has no reader in Python."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, struct.Struct("<IHB")  # a record's: checksum, length, kind
_WHOLE, _LAST = 1, 4  # kinds of pieces that end a record


def read_records(file: Path) -> Iterator[Any]:
    """Every record of a run-ID.wandb."""
    data = file.read_bytes()
    assert data.startswith(b":W&B")
    place, whole = _FILE_HEADER, b""
    while place + _HEADER.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER.size:
            place += left
            continue
        _, length, kind = _HEADER.unpack_from(data, place)
        place += _HEADER.size
        whole += data[place : place + length]
        place += length
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(whole)
            whole = b""


def read_history(file: Path) -> dict[int, dict[str, Any]]:
    """What was logged, by step; the fields of a table have slashes in their names."""
    found = {}
    for record in read_records(file):
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found[row["_step"]] = row
    return found
