"""What a file is read as: lines as they stand, their values, and what is wrong with a line. A leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Raw:
    """A line as it stands in the file, from 1; of a JSON list an item, from 1, and the line that it begins on."""

    number: int
    content: bytes
    item: int | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """The value of a line."""

    number: int
    value: Any
    item: int | None = None


@dataclass(frozen=True, slots=True)
class BadLine:
    """What is wrong with a line and how to mend it; `field` is where in it, as a path, and the subject of `reason`."""

    number: int
    reason: str
    field: str | None = None
    item: int | None = None

    @property
    def said(self) -> str:
        return self.reason if self.field is None else f"{self.field} {self.reason}"

    def __str__(self) -> str:
        where = f"Line {self.number}" if self.item is None else f"Item {self.item} (line {self.number})"
        return f"{where}: {self.said}"


def too_long(number: int, limit_bytes: int, item: int | None = None) -> BadLine:
    reason = f"is longer than {limit_bytes >> 20} MiB; split the example into shorter ones"
    return BadLine(number, reason, item=item)
