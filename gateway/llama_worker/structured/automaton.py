"""The states of a grammar while its text grows, byte by byte. Pure; on the decode loop's thread.

A state is a set of stacks, a stack is a position and what follows once its rule is done. Both are numbered as they appear, so
that a step which was taken once is a dictionary lookup ever after: inside a long string, that is each step. Its rule: work is
counted, and past the limit GrammarTooCostly ends the request instead of the patience of everybody else.
"""

from __future__ import annotations

from gateway.llama_worker.structured.gbnf import GrammarError
from gateway.llama_worker.structured.rules import Grammar

DEAD = 0  # the state with no stacks
EMPTY = 0  # the stack with nothing on it: the text is whole
MAX_STACKS = 512  # in one state: more means that the grammar reads the same text in ever more ways
MAX_KEPT = 100_000  # numbers kept in all tables; past that, the automaton is rebuilt from the state it is in


class GrammarTooCostly(GrammarError):
    """The grammar reads the text in too many ways to follow."""

    def __init__(self) -> None:
        super().__init__(
            "The grammar or schema can read this text in too many ways at once, which takes too long to follow. Make its "
            "alternatives differ in their first characters."
        )


class Automaton:
    """The states met so far. `work` counts what was computed (not looked up); `limit` is where it stops."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.work = 0
        self.limit = 100_000
        self._tops = [0]
        self._rests = [EMPTY]
        self._stack_numbers: dict[tuple[int, int], int] = {}
        self._closures: dict[int, tuple[int, ...]] = {EMPTY: (EMPTY,)}
        self._stacks: list[tuple[int, ...]] = [()]
        self._state_numbers: dict[tuple[int, ...], int] = {(): DEAD}
        self._edges: list[dict[int, int]] = [{}]
        self._kept = 0
        self.start = self._state(set(self._closure(self._push(grammar.start, EMPTY))))

    def step(self, state: int, byte: int) -> int:
        """The state after one byte more; DEAD when the grammar does not allow it."""
        following = self._edges[state].get(byte)
        if following is None:
            following = self._edges[state][byte] = self._compute(state, byte)
            self._kept += 1
        return following

    def run(self, state: int, data: bytes) -> tuple[int, int]:
        """(state after `data`, bytes taken): the state is DEAD when the byte after those taken is not allowed."""
        for taken, byte in enumerate(data):
            following = self._edges[state].get(byte)
            if following is None:
                following = self.step(state, byte)
            if following == DEAD:
                return DEAD, taken
            state = following
        return state, len(data)

    def charge(self, work: int) -> None:
        """Counts `work`, done or about to be; GrammarTooCostly past the limit."""
        self.work += work
        if self.work > self.limit:
            raise GrammarTooCostly

    def accepts(self, state: int) -> bool:
        """Whether the text may end here."""
        return EMPTY in self._stacks[state]

    def is_over(self, state: int) -> bool:
        """Whether the text must end here."""
        return self._stacks[state] == (EMPTY,)

    def first_bytes(self, state: int) -> int:
        """Which bytes may come next, as a mask."""
        masks, tops = self._grammar.masks, self._tops
        allowed = 0
        for stack in self._stacks[state]:
            allowed |= masks[tops[stack]]
        return allowed

    @property
    def full(self) -> bool:
        """Whether it remembers so much that `rebuilt` should replace it."""
        return self._kept > MAX_KEPT

    def rebuilt(self, state: int) -> tuple[Automaton, int]:
        """A fresh automaton that knows `state` alone, and that state in it."""
        fresh = Automaton(self._grammar)
        stacks = set()
        for stack in self._stacks[state]:
            positions = []
            while stack != EMPTY:
                positions.append(self._tops[stack])
                stack = self._rests[stack]
            for position in reversed(positions):
                stack = fresh._push(position, stack)
            stacks.add(stack)
        return fresh, fresh._state(stacks)

    def _compute(self, state: int, byte: int) -> int:
        masks, following, tops, rests = self._grammar.masks, self._grammar.following, self._tops, self._rests
        found: set[int] = set()
        for stack in self._stacks[state]:
            top = tops[stack]
            if masks[top] >> byte & 1:
                found.update(self._closure(self._push(following[top], rests[stack])))
        return self._state(found)

    def _closure(self, stack: int) -> tuple[int, ...]:
        """`stack` with every rule on its top expanded until a byte comes next."""
        known = self._closures.get(stack)
        if known is not None:
            return known
        grammar, tops, rests = self._grammar, self._tops, self._rests
        found, seen, todo = [], {stack}, [stack]
        while todo:
            self.charge(1)
            current = todo.pop()
            top = tops[current]
            if current == EMPTY or grammar.masks[top]:
                found.append(current)
                continue
            after = self._push(grammar.following[top], rests[current])
            starts = grammar.rules[grammar.refs[top]]
            self.charge(len(starts))
            for start in starts:
                expanded = self._push(start, after)
                if expanded not in seen:
                    seen.add(expanded)
                    todo.append(expanded)
        closure = self._closures[stack] = tuple(found)
        self._kept += len(found)
        return closure

    def _push(self, position: int, rest: int) -> int:
        if position == 0:
            return rest
        number = self._stack_numbers.get((position, rest))
        if number is None:
            number = self._stack_numbers[position, rest] = len(self._tops)
            self._tops.append(position)
            self._rests.append(rest)
            self._kept += 1
        return number

    def _state(self, stacks: set[int]) -> int:
        self.charge(1 + len(stacks))
        if len(stacks) > MAX_STACKS:
            raise GrammarTooCostly
        key = tuple(sorted(stacks))
        number = self._state_numbers.get(key)
        if number is None:
            number = self._state_numbers[key] = len(self._stacks)
            self._stacks.append(key)
            self._edges.append({})
            self._kept += len(key)
        return number
