"""Numbers between two bounds as GBNF. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

LARGEST = 10**15
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_FRACTION = '("." [0-9]{1,16})?'
_ZERO_FRACTION = '("." "0"{1,16})?'
_ABOVE_ZERO = '"." "0"{0,15} [1-9] [0-9]{0,15}'


def between(schema: dict[str, Any], integer: bool, error: Callable[[str], Exception]) -> str:
    """The numbers within the bounds that `schema` sets; raises what `error` makes of a reason."""
    bounds: dict[str, float] = {}
    for name in _BOUNDS:
        value = schema.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > LARGEST:
            raise error(f"{name!r} must be a number of at most {LARGEST}")
        if not integer and value != int(value):
            raise error(
                f"{name!r} is {value}, and bounds of a number that is no integer are supported only where they are whole"
            )
        bounds[name] = value
    options = _integers(bounds) if integer else _decimals(bounds)
    if not options:
        raise error("no number lies between 'minimum' and 'maximum'")
    return " | ".join(options)


def _integers(bounds: dict[str, float]) -> list[str]:
    low = math.ceil(bounds.get("minimum", -LARGEST))
    high = math.floor(bounds.get("maximum", LARGEST))
    if "exclusiveMinimum" in bounds:
        low = max(low, math.floor(bounds["exclusiveMinimum"]) + 1)
    if "exclusiveMaximum" in bounds:
        high = min(high, math.ceil(bounds["exclusiveMaximum"]) - 1)
    options = []
    if low <= high and low < 0:
        options.append(f'"-" ({_digits(max(1, -high), -low)})')
    if low <= high and high >= 0:
        options.append(f"({_digits(max(0, low), high)})")
    return options


def _decimals(bounds: dict[str, float]) -> list[str]:
    low, open_low = max(
        (int(bounds.get(name, -LARGEST)), name == "exclusiveMinimum") for name in ("minimum", "exclusiveMinimum")
    )
    high, closed_high = min(
        (int(bounds.get(name, LARGEST)), name == "maximum") for name in ("maximum", "exclusiveMaximum")
    )
    options = []
    if low < 0:  # magnitudes: the bounds change places
        nearest, open_nearest = (0, high == 0 and not closed_high) if high >= 0 else (-high, not closed_high)
        options += [f'"-" {part}' for part in _magnitudes(nearest, open_nearest, -low, open_low)]
    if high >= 0:
        nearest, open_nearest = (0, False) if low < 0 else (low, open_low)
        options += _magnitudes(nearest, open_nearest, high, not closed_high)
    return options


def _magnitudes(low: int, open_low: bool, high: int, open_high: bool) -> list[str]:
    """Decimals from `low` to `high`, both at least 0, without an open end."""
    options = []
    if low < high:
        if open_low:
            options.append(f'"{low}" {_ABOVE_ZERO}')
        if low + open_low <= high - 1:
            options.append(f"({_digits(low + open_low, high - 1)}) {_FRACTION}")
    if not open_high and (low < high or (low == high and not open_low)):
        options.append(f'"{high}" {_ZERO_FRACTION}')
    return options


def _digits(low: int, high: int) -> str:
    """The integers from `low` to `high`, both at least 0, without leading zeros."""
    options = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        options.append(_of_length(str(first), str(last)))
    return " | ".join(options)


def _of_length(low: str, high: str) -> str:
    """The strings of digits from `low` to `high`, which have the same length."""
    if low == high:
        return f'"{low}"'
    size = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" ({_of_length(low[1:], high[1:])})'
    first, last = int(low[0]), int(high[0])
    options = []
    if size and low[1:] != "0" * size:
        options.append(f'"{first}" ({_of_length(low[1:], "9" * size)})')
        first += 1
    tail = None
    if size and high[1:] != "9" * size:
        tail = f'"{last}" ({_of_length("0" * size, high[1:])})'
        last -= 1
    if first <= last:
        options.append(f"[{first}-{last}]" + (f" [0-9]{{{size}}}" if size else ""))
    return " | ".join([*options, tail] if tail else options)
