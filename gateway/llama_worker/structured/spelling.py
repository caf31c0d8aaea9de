"""Text and sets of characters as GBNF spells them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.llama_worker.structured.utf8 import MAX_CODE_POINT

CharRanges = list[tuple[int, int]]  # code points, both ends included

# What a JSON string cannot hold as it is, and its short escape.
JSON_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
JSON_FORBIDDEN: CharRanges = [(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\")), (0x7F, 0x7F)]


def quote(text: str) -> str:
    """`text` as a GBNF literal."""
    return '"' + "".join(_spell(char, '"\\') for char in text) + '"'


def char_class(ranges: Iterable[tuple[int, int]]) -> str:
    """A GBNF class of the code points in `ranges`."""
    parts = []
    for low, high in ranges:
        parts.append(_spell(chr(low), "\\[]^-") + ("" if low == high else "-" + _spell(chr(high), "\\[]^-")))
    return "[" + "".join(parts) + "]"


def json_class(ranges: CharRanges) -> str:
    """One character of `ranges` as it stands in a JSON string: itself, or its escape."""
    plain = subtract(ranges, JSON_FORBIDDEN)
    escaped = [
        quote(escape) for char, escape in JSON_ESCAPES.items() if any(low <= ord(char) <= high for low, high in ranges)
    ]
    options = ([char_class(plain)] if plain else []) + escaped
    return "(" + " | ".join(options) + ")" if options else "[]"


def json_text(text: str) -> str:
    """`text` as it stands inside a JSON string."""
    return "".join(JSON_ESCAPES.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 32 else char) for char in text)


def subtract(ranges: Iterable[tuple[int, int]], gone: Iterable[tuple[int, int]]) -> CharRanges:
    """`ranges` without `gone`, in order and without overlaps."""
    left = normalise(ranges)
    for first, last in gone:
        left = [
            part
            for low, high in left
            for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
            if part[0] <= part[1]
        ]
    return sorted(set(left))


def complement(ranges: Iterable[tuple[int, int]]) -> CharRanges:
    """Every other code point."""
    return subtract([(0, MAX_CODE_POINT)], ranges)


def normalise(ranges: Iterable[tuple[int, int]]) -> CharRanges:
    """The same code points in order, overlaps merged."""
    merged: CharRanges = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _spell(char: str, special: str) -> str:
    code = ord(char)
    if char in special:
        return f"\\x{code:02X}"
    if 32 <= code < 127:
        return char
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
