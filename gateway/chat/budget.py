"""What one rendering of a template may spend: time, steps, and room for what it makes.

Place in the flow: sandbox routes → **budget**; foresee asks it beforehand. One rule: whoever spends too much is stopped here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

TIME_LIMIT_S = 0.5
STEP_LIMIT = 2_000_000
SIZE_LIMIT = 8 * 1024 * 1024  # characters of a text; a list or a mapping counts with all that it holds
TOTAL_LIMIT = 128 * 1024 * 1024  # of all texts that one rendering makes
BITS_LIMIT = 4096
_DEPTH_LIMIT = 60
ITEM_WEIGHT = 16


class Exceeded(Exception):
    """A bound was met. No ValueError, since Jinja's own filters catch those."""


class Budget:
    """What one rendering may still spend."""

    __slots__ = ("_deadline", "_room", "_steps")

    def __init__(self, steps: int = STEP_LIMIT, room: int = TOTAL_LIMIT) -> None:
        self._steps, self._room = steps, room
        self._deadline = time.monotonic() + TIME_LIMIT_S

    def tick(self) -> None:
        self._steps -= 1
        if self._steps < 0 or time.monotonic() > self._deadline:
            raise Exceeded(f"ran for more than {TIME_LIMIT_S} s or {STEP_LIMIT} steps")

    def spend(self, size: int) -> None:
        """Counts a text of `size` characters. To be called before it is made, where its size can be foreseen."""
        if size > SIZE_LIMIT:
            raise Exceeded(f"makes a text or list of more than {SIZE_LIMIT} characters")
        self._room -= size
        if self._room < 0:
            raise Exceeded(f"makes more than {TOTAL_LIMIT} characters of text")

    def keep(self, value: Any) -> Any:
        """A new value, once it is known to be within bounds; what comes bit by bit is counted as it comes."""
        if isinstance(value, str | bytes):
            self.spend(len(value))
        elif isinstance(value, int):
            if value.bit_length() > BITS_LIMIT:
                raise Exceeded("computes with numbers beyond all bounds")
        elif isinstance(value, list | tuple | dict | set | frozenset):
            self.spend(ITEM_WEIGHT * len(value))
            check_weight(value)
        elif hasattr(value, "__next__"):
            return self._watched(value)
        return value

    def _watched(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.tick()
            yield value


def check_weight(value: Any) -> None:
    """Raises where all that a value holds, counted as often as it is in there, is too much: printing it would be too."""
    total, level = 0, [value]
    for _ in range(_DEPTH_LIMIT):
        below: list[Any] = []
        for held in level:
            if isinstance(held, str | bytes):
                total += len(held)
            elif isinstance(held, dict):
                total += 2 * ITEM_WEIGHT * len(held)
                below += held.keys()
                below += held.values()
            elif isinstance(held, _HOLDERS):
                items: Any = held
                total += ITEM_WEIGHT * len(items)
                below += items
            if total > SIZE_LIMIT:
                raise Exceeded(f"makes a list of more than {SIZE_LIMIT} characters")
        if not below:
            return
        level = below
    raise Exceeded(f"nests lists more than {_DEPTH_LIMIT} deep")


_HOLDERS: tuple[type[Any], ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))
