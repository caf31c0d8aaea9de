"""Which sequence id of the context each running sequence has. Pure; on the decode loop's thread.

llama.cpp decodes sequences in one pass only while their ids follow one another: at each gap it starts another pass, and
streams all weights again. So the sequences of one adapter sit side by side, a newcomer takes the seat that joins most, and
where those who left have torn a group apart, it can be closed again by moving one.
"""

from __future__ import annotations

WORTH_MOVING = 2  # members; moving a larger part of a group costs more than its gap


class Seating:
    """The seats 0 … count - 1 and the groups that sit on them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._groups: list[int | None] = [None] * count
        self.free = count

    def take(self, group: int) -> int:
        """The best free seat for one more of `group`; there must be one."""
        seat = min(
            (seat for seat in range(self.count) if self._groups[seat] is None), key=lambda s: self._cost(s, group)
        )
        self._groups[seat] = group
        self.free -= 1
        return seat

    def leave(self, seat: int) -> None:
        """Frees a seat."""
        self._groups[seat] = None
        self.free += 1

    def parts(self, group: int) -> list[list[int]]:
        """The seats of `group`, in order, as runs of neighbours."""
        runs: list[list[int]] = []
        for seat, sitting in enumerate(self._groups):
            if sitting == group:
                if runs and runs[-1][-1] == seat - 1:
                    runs[-1].append(seat)
                else:
                    runs.append([seat])
        return runs

    def move(self, group: int) -> tuple[int, int] | None:
        """(from, to) of a move that brings a torn group together, made here; None when none is worth it."""
        runs = self.parts(group)
        if len(runs) < 2:
            return None
        smallest = min(runs, key=len)
        if len(smallest) > WORTH_MOVING:
            return None
        beside = [seat for run in runs if run is not smallest for seat in (run[0] - 1, run[-1] + 1)]
        target = next((seat for seat in beside if 0 <= seat < self.count and self._groups[seat] is None), None)
        if target is None:
            return None
        self._groups[target], self._groups[smallest[-1]] = group, None
        return smallest[-1], target

    def undo(self, move: tuple[int, int], group: int) -> None:
        """Takes back what `move` made."""
        source, target = move
        self._groups[source], self._groups[target] = group, None

    def _cost(self, seat: int, group: int) -> tuple[int, int, int]:
        """Less is better: beside one's own, not beside another group, and with room to grow on both sides."""
        left = self._groups[seat - 1] if seat else None
        right = self._groups[seat + 1] if seat + 1 < self.count else None
        own = (left == group and seat > 0) + (right == group and seat + 1 < self.count)
        before = after = 0
        while seat - before - 1 >= 0 and self._groups[seat - before - 1] is None:
            before += 1
        while seat + after + 1 < self.count and self._groups[seat + after + 1] is None:
            after += 1
        if own:
            return (-own, 0 if seat and left == group else 1, seat)  # every group grows to the right: they meet late
        everything_free = self.free == self.count
        return (0, 0 if everything_free else -min(before, after) * 2 - before - after, seat)
