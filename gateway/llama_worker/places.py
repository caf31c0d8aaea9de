"""The sequences of the context, and the KV that is in them. On the decode loop's thread.

A request takes a place for each of its choices, beside those of its adapter (see seating), and gives it back empty.
"""

from __future__ import annotations

import logging

from gateway.llama_worker.native import Bytes, Context, NativeError
from gateway.llama_worker.seating import Seating

log = logging.getLogger(__name__)


class Places:
    """Hands out the context's sequence ids."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._seating = Seating(context.size.sequences)
        self.given_back = 0  # since the start
        self._torn = False  # a group may have a gap: somebody has come or gone

    @property
    def free(self) -> int:
        """How many are left."""
        return self._seating.free

    @property
    def taken(self) -> int:
        """How many are in use."""
        return self._seating.count - self._seating.free

    @property
    def positions_used(self) -> int:
        """Of the context's KV, over all places, those that are free included."""
        return sum(self._context.length(place) for place in range(self._seating.count))

    def take(self, group: int, count: int) -> list[int]:
        """So many places beside those of `group`; there must be as many."""
        self._torn = True
        return [self._seating.take(group) for _ in range(count)]

    def give_back(self, place: int) -> None:
        """Empties a place and frees it."""
        self._context.clear(place)
        self._seating.leave(place)
        self.given_back += 1
        self._torn = True

    def save(self, place: int) -> Bytes:
        """The KV in a place, in ordinary memory; NativeError."""
        return self._context.save(place)

    def fill(self, place: int, blob: Bytes, length: int | None = None) -> None:
        """Puts saved KV into a place, of which the first `length` positions; NativeError leaves it empty."""
        self._context.restore(place, blob)
        if length is not None:
            self._context.truncate(place, length)

    def close_gap(self, group: int) -> tuple[int, int] | None:
        """Moves one sequence of a torn group beside the others: (from, to), or None when nothing is to be done."""
        if not self._torn:
            return None
        move = self._seating.move(group)
        if move is None:
            self._torn = False
            return None
        source, target = move
        try:
            self._context.restore(target, self._context.save(source))
        except NativeError as error:  # the gap costs time, no more; it is looked at again when somebody comes or goes
            log.warning("a sequence was not moved: %s", error)
            self._seating.undo(move, group)
            self._torn = False
            return None
        self._context.clear(source)
        return move
