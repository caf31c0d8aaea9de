"""Ranges of code points as sequences of byte sets: how UTF-8 spells them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

MAX_CODE_POINT = 0x10FFFF
_LENGTHS = ((0x00, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, MAX_CODE_POINT))  # no surrogates

Chain = tuple[int, ...]  # one mask a byte: bit b = byte b


def byte_chains(ranges: Iterable[tuple[int, int]]) -> list[Chain]:
    """The spellings of the code points in `ranges`, as few chains as share their last bytes."""
    by_tail: dict[Chain, int] = {}
    for low, high in ranges:
        for first, last in _LENGTHS:
            if low <= last and first <= high:
                for head, *tail in _split(chr(max(low, first)).encode(), chr(min(high, last)).encode()):
                    by_tail[tuple(tail)] = by_tail.get(tuple(tail), 0) | head
    return [(head, *tail) for tail, head in by_tail.items()]


def _split(low: bytes, high: bytes) -> Iterator[Chain]:
    """Chains for all spellings from `low` to `high`, which have the same length."""
    if len(low) == 1:
        yield (_mask(low[0], high[0]),)
        return
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    if low[0] == high[0]:
        for tail in _split(low[1:], high[1:]):
            yield (_mask(low[0], low[0]), *tail)
        return
    first, last = low[0], high[0]
    if low[1:] != least:
        for tail in _split(low[1:], most):
            yield (_mask(first, first), *tail)
        first += 1
    if high[1:] != most:
        for tail in _split(least, high[1:]):
            yield (_mask(last, last), *tail)
        last -= 1
    if first <= last:
        yield (_mask(first, last), *[_mask(0x80, 0xBF)] * (len(low) - 1))


def _mask(low: int, high: int) -> int:
    return (1 << high + 1) - (1 << low)
