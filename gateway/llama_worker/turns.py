"""Whose turn it is: the adapter whose prompts and sequences the next rounds compute. Pure; on the decode loop's thread.

One llama_decode runs under one adapter, and a change of adapter makes llama.cpp reserve its graphs again: some milliseconds,
where a step of a small model takes ten. Changing at every step would give a third of the machine to that. So a group
keeps its turn until the change has become a small share of it, then the next in line follows: round robin over the groups
with work, so that none starves and each waits for one turn of every other at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

CHANGE_SHARE = 20  # a turn is so many times as long as the change to it
SHORTEST_S, LONGEST_S = 0.01, 0.15
FIRST_GUESS_S = 0.004
MEMORY = 0.2  # of a new measurement in the running mean


class Turns:
    """Round robin over groups that appear and disappear. A group is a number: 0 is the base."""

    def __init__(self) -> None:
        self.current = -1
        self._line: list[int] = []  # in the order of their next turn
        self._since = 0.0
        self._change_s = FIRST_GUESS_S

    @property
    def length_s(self) -> float:
        """How long a group keeps its turn while others wait."""
        return min(LONGEST_S, max(SHORTEST_S, CHANGE_SHARE * self._change_s))

    def next(self, groups: Sequence[int], now: float | None = None) -> int:
        """The group of the next round, of those that have work (at least one)."""
        now = time.monotonic() if now is None else now
        self._line = [group for group in self._line if group in groups]
        self._line += [group for group in groups if group not in self._line]
        if self.current in groups and (len(groups) == 1 or now - self._since < self.length_s):
            return self.current
        if self.current in self._line:  # to the end of the line
            self._line.remove(self.current)
            self._line.append(self.current)
        self.current, self._since = self._line[0], now
        return self.current

    def changed(self, first_step_s: float, next_step_s: float) -> None:
        """Learns what a change costs: a group's first step of a turn against its second, of the same size."""
        self._change_s += MEMORY * (max(0.0, first_step_s - next_step_s) - self._change_s)
