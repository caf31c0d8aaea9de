"""A file of JSON → one value a line, or an item of its list, read with bounded memory.

Place in the flow: **jsonl** → forms → dataset. One rule: a file is a stranger's; whatever is in it ends as a `BadLine` with its
number, never as an exception and never as memory. Alpaca and ShareGPT come as one JSON list: `json_list` cuts those.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.json_list import split_list
from trainer.data.lines import BadLine, Line, Raw, too_long

LINE_LIMIT_BYTES = 8 << 20
_NUMBER_LIMIT = 100  # digits
_BOM = b"\xef\xbb\xbf"


class Malformed(ValueError):
    """A value that JSON allows, or nearly, and this project does not."""


def read_lines(path: Path, limit_bytes: int = LINE_LIMIT_BYTES) -> Iterator[Line | BadLine]:
    """Each line's value. A BOM, CRLF, blank lines and a missing last newline are taken."""
    return map(parse_line, split_file(path, limit_bytes))


def split_file(path: Path, limit_bytes: int = LINE_LIMIT_BYTES) -> Iterator[Raw | BadLine]:
    """The lines, or the items where the file is one JSON list, not parsed yet."""
    with path.open("rb") as file:
        file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
        began = file.tell()
        first = b""
        while not first.strip() and (piece := file.read(1 << 16)):
            first = piece
        file.seek(began)
        yield from (split_list if first.lstrip()[:1] == b"[" else _split_lines)(file, limit_bytes)


def parse_line(raw: Raw | BadLine) -> Line | BadLine:
    """The value of a line or an item."""
    found = raw if isinstance(raw, BadLine) else _parse(raw.number, raw.content)
    return found if raw.item is None else replace(found, item=raw.item)


def _split_lines(file: BinaryIO, limit_bytes: int) -> Iterator[Raw | BadLine]:
    number = 0
    while line := file.readline(limit_bytes + 1):
        number += 1
        if len(line) > limit_bytes:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield too_long(number, limit_bytes)
        elif line.strip():
            yield Raw(number, line)


def _parse(number: int, content: bytes) -> Line | BadLine:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.start + 1} (0x{content[error.start]:02x})"
        return BadLine(number, f"{found} is not UTF-8; save the file as UTF-8")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")  # some of Python's own end so
        return BadLine(
            number,
            f"is not JSON: {what} at column {error.colno}; each line must be one JSON object, or the file one JSON list",
        )
    except Malformed as error:
        return BadLine(number, str(error))
    except RecursionError:
        return BadLine(number, "is nested too deeply; an example needs no more than a few levels")
    return Line(number, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"has the key {ascii(twice)[:60]} twice in one object; keep one of them")
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
