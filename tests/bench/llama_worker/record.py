"""Measurements of earlier runs, one JSON line each: rounds add up over several quiet minutes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.bench.llama_worker.rows import Measured, Row

Entry = tuple[Row, str, Measured]  # of the server of that name


def read(path: Path | None) -> list[Entry]:
    """What `path` holds; nothing where there is no such file."""
    if path is None or not path.exists():
        return []
    return [msgspec.json.decode(line, type=Entry) for line in path.read_bytes().splitlines()]


def add(path: Path | None, entry: Entry) -> None:
    """Appends one measurement."""
    if path is not None:
        with path.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
