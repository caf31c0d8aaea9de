"""A JSON-lines file → one object a line, read with bounded memory.

Place in the flow: jsonl → conversations → dataset. One rule: a file is a stranger's; whatever is in it ends as a `BadLine`
with its number, never as an exception and never as memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINE_LIMIT_BYTES = 32 << 20
_NUMBER_LIMIT = 100  # digits
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadLine:
    """What is wrong with a line and how to mend it; `number` counts from 1."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"Line {self.number}: {self.reason}"


class Malformed(ValueError):
    """A value that JSON allows, or nearly, and this project does not."""


def read_jsonl(path: Path, limit_bytes: int = LINE_LIMIT_BYTES) -> Iterator[tuple[int, Any] | BadLine]:
    """Each line's number and value. A BOM, CRLF, blank lines and a missing last newline are taken."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit_bytes + 1):
            number += 1
            if len(line) > limit_bytes:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield BadLine(number, f"is longer than {limit_bytes >> 20} MiB; split the example into shorter ones")
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _parse(number, line)


def _parse(number: int, line: bytes) -> tuple[int, Any] | BadLine:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return BadLine(
            number, f"byte {error.start + 1} (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        )
    try:
        return number, json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        return BadLine(number, f"is not JSON: {error.msg} at column {error.colno}; each line must be one JSON object")
    except Malformed as error:
        return BadLine(number, str(error))
    except RecursionError:
        return BadLine(number, "is nested too deeply; an example needs no more than a few levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"has the key {twice!r} twice in one object; keep one of them")
    return found


def _constant(name: str) -> Any:
    raise Malformed(f"holds {name}, which is not a JSON number; write null or leave the field out")


def _float(digits: str) -> float:
    value = float(digits)
    if len(digits) > _NUMBER_LIMIT or not math.isfinite(value):
        raise Malformed(f"holds the number {digits[:20]}…, which is out of range")
    return value


def _int(digits: str) -> int:
    if len(digits) > _NUMBER_LIMIT:
        raise Malformed(f"holds a number of {len(digits)} digits; at most {_NUMBER_LIMIT} are taken")
    return int(digits)
