"""One JSON list → its items as bytes, whatever its size: only the item at hand is held.

Place in the flow: beside `jsonl`, which parses the items. One rule: nothing is understood here but strings and brackets; what
is wrong within an item is found when it is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from trainer.data.lines import BadLine, Raw, too_long

_CHUNK_BYTES = 1 << 20
_OUTSIDE = re.compile(rb'["{}\[\],]')
_DEEPEST = 2000  # brackets in brackets: what comes after so many is not read
_INSIDE = re.compile(rb'["\\]')


def split_list(file: BinaryIO, limit_bytes: int) -> Iterator[Raw | BadLine]:
    """The items of the list that begins in `file`, in order. Bounded by `limit_bytes` and a chunk."""
    cutter = _Cutter(limit_bytes)
    while (chunk := file.read(_CHUNK_BYTES)) and not cutter.gave_up:
        yield from cutter.feed(chunk)
    yield from cutter.end()


class _Cutter:
    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._depth = 0  # 0 outside the list, 1 between its items
        self.gave_up = False  # on what nobody means as data; scanning it would take as long as it is
        self._closed = self._in_string = self._escaped = False
        self._held: list[bytes] = []
        self._size = self._lost_lines = 0
        self._line, self._item = 1, 0  # where the item at hand begins; how many there were before it

    def feed(self, chunk: bytes) -> Iterator[Raw | BadLine]:
        at = taken = 0
        while True:
            if self._escaped and at < len(chunk):
                at, self._escaped = at + 1, False
            mark = (_INSIDE if self._in_string else _OUTSIDE).search(chunk, at)
            if mark is None:
                break
            at, sign = mark.end(), mark[0]
            if self._in_string:
                self._escaped, self._in_string = sign == b"\\", sign != b'"'
            elif sign == b'"':
                self._in_string = True
            elif sign in b"[{":
                self._depth += 1
                if self._depth == 1 and not self._closed:
                    self._line += chunk.count(b"\n", taken, at)
                    taken = at
                elif self._depth > _DEEPEST:
                    self.gave_up = True
                    yield BadLine(
                        self._line, "is nested too deeply; the file is not read on from here", item=self._item + 1
                    )
                    return
            elif self._closed or (sign == b"," and self._depth > 1):
                continue
            elif self._depth > 1:
                self._depth -= 1
            elif sign in b",]":
                self._hold(chunk[taken : at - 1])
                taken = at
                if sign == b"," or self._item or self._is_something():
                    yield self._take()
                self._closed = sign == b"]"
        self._hold(chunk[taken:])

    def end(self) -> Iterator[BadLine]:
        rest = b"".join(self._held)
        if self.gave_up:
            return
        if not self._closed:
            yield BadLine(
                self._line, "begins an item that is not closed, nor is the list: the file seems to be cut off"
            )
        elif self._is_something():
            line = self._line + rest[: len(rest) - len(rest.lstrip())].count(b"\n")
            yield BadLine(
                line, "goes on after the end of the list; the file must be one JSON list, or one object a line"
            )

    def _hold(self, piece: bytes) -> None:
        """Keeps a piece of the item, up to the limit; of what is beyond it only the newlines are counted."""
        if self._size + len(piece) <= self._limit:
            self._held.append(piece)
        else:
            self._lost_lines += piece.count(b"\n")
        self._size += len(piece)

    def _is_something(self) -> bool:
        return self._size > self._limit or any(piece.strip() for piece in self._held)

    def _take(self) -> Raw | BadLine:
        """The item that ends here."""
        content, size = b"".join(self._held), self._size
        first_line = self._line + content[: len(content) - len(content.lstrip())].count(b"\n")
        self._line += content.count(b"\n") + self._lost_lines
        self._held.clear()
        self._size = self._lost_lines = 0
        self._item += 1
        if size > self._limit:
            return too_long(first_line, self._limit, self._item)
        if not content.strip():
            return BadLine(first_line, "is empty: there is a comma with nothing beside it", item=self._item)
        return Raw(first_line, content, self._item)
