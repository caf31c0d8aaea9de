"""Which of a model's tokens a grammar allows next. On the decode loop's thread.

Its rule: the token that the sampler likes best is checked first, and only what is refused costs more. Tokens are held sorted by
their bytes, so that one refusal rules out every token that begins in the same way.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from gateway.llama_worker.structured.automaton import DEAD, Automaton, GrammarTooCostly
from gateway.llama_worker.structured.rules import Grammar

Ids = npt.NDArray[np.int64]

NO_BYTE = 256
MAX_FORCED = 64
WORK_A_TOKEN = 4_000  # units of the automaton's work that a token earns (about 2 ms)
WORK_AT_ONCE = 40_000  # that may be saved up for a harder one
WORK_A_CHECK = 2  # what the check of one token costs besides


class Vocabulary:
    """The bytes of each token, empty where it is no text (control tokens), and the order of those bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        spoken = [token for token, piece in enumerate(pieces) if piece]
        spoken.sort(key=pieces.__getitem__)
        self.order: Ids = np.array(spoken, dtype=np.int64)
        self._sorted = [pieces[token] for token in spoken]
        self.ranks: Ids = np.full(len(pieces), -1, dtype=np.int64)
        self.ranks[self.order] = np.arange(len(spoken))
        self._first = np.array([piece[0] if piece else NO_BYTE for piece in pieces], dtype=np.int16)

    def beginning_with(self, prefix: bytes) -> slice:
        """Where in `order` the tokens lie whose bytes begin with `prefix`."""
        low = bisect_left(self._sorted, prefix)
        above = prefix.rstrip(b"\xff")
        high = len(self._sorted) if not above else bisect_left(self._sorted, above[:-1] + bytes([above[-1] + 1]))
        return slice(low, high)

    def starting_in(self, bytes_mask: int) -> Ids:
        """The ids of the tokens whose first byte is in the mask, ascending."""
        table = np.zeros(NO_BYTE + 1, dtype=np.bool_)
        table[:NO_BYTE] = np.unpackbits(np.frombuffer(bytes_mask.to_bytes(32, "little"), np.uint8), bitorder="little")
        return np.flatnonzero(table[self._first])

    def along(self, text: bytes) -> Ids:
        """The ids of the tokens that `text` begins with, or that begin with `text`; ascending."""
        found = [self.order[self.beginning_with(text)]]
        for size in range(1, len(text)):
            low = high = bisect_left(self._sorted, text[:size])
            while high < len(self._sorted) and self._sorted[high] == text[:size]:
                high += 1
            found.append(self.order[low:high])
        return np.sort(np.concatenate(found))


class Structure:
    """A compiled grammar for one vocabulary; any number of sequences are held to it at the same time."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._grammar = grammar
        self._automaton = Automaton(grammar)

    def constraint(self, end_ids: Iterable[int]) -> Constraint:
        """One sequence at its beginning; `end_ids` are the tokens that end it."""
        if self._automaton.full:
            self._automaton = Automaton(self._grammar)
        return Constraint(self._automaton, self.vocabulary, frozenset(end_ids))


class Constraint:
    """How far one sequence has come in its grammar."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary, end_ids: frozenset[int]) -> None:
        self._automaton, self._vocabulary, self._end_ids = automaton, vocabulary, end_ids
        self._state = automaton.start
        self._budget = WORK_AT_ONCE
        self._refused: npt.NDArray[np.bool_] | None = None  # by rank; of the present state

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._automaton.is_over(self._state)

    def begin(self) -> None:
        """Call before the checks of each token: it grants them their work."""
        self._budget = min(WORK_AT_ONCE, self._budget + WORK_A_TOKEN)
        self._refused = None

    def allows(self, token: int) -> bool:
        """Whether `token` may come next. Raises GrammarTooCostly."""
        if token in self._end_ids and self._automaton.accepts(self._state):
            return True
        piece = self._vocabulary.pieces[token]
        if not piece or (self._refused is not None and self._refused[self._vocabulary.ranks[token]]):
            return False
        self._budget -= WORK_A_CHECK
        state, taken = self._run(piece)
        if state != DEAD:
            return True
        if self._refused is None:
            self._refused = np.zeros(len(self._vocabulary.order), dtype=np.bool_)
        self._refused[self._vocabulary.beginning_with(piece[: taken + 1])] = True
        return False

    def candidates(self) -> Ids:
        """The ids, ascending, that may still be allowed: not refused so far, and beginning as the grammar does."""
        forced = self._forced()
        if forced:
            found = self._vocabulary.along(forced)
        else:
            found = self._vocabulary.starting_in(self._automaton.first_bytes(self._state))
        if self._refused is not None:
            found = found[~self._refused[self._vocabulary.ranks[found]]]
        if self._automaton.accepts(self._state):
            found = np.union1d(found, np.fromiter(self._end_ids, dtype=np.int64))
        return found

    def accept(self, token: int) -> None:
        """Goes on with a token that `allows` has allowed."""
        piece = self._vocabulary.pieces[token]
        state, _ = self._run(piece) if piece else (DEAD, 0)
        if state == DEAD:
            return  # a token that ends the text
        self._state = state
        if self._automaton.full:
            self._automaton, self._state = self._automaton.rebuilt(state)

    def _run(self, piece: bytes) -> tuple[int, int]:
        before = self._allow_work()
        try:
            return self._automaton.run(self._state, piece)
        finally:
            self._budget -= self._automaton.work - before

    def _forced(self) -> bytes:
        before = self._allow_work()
        try:
            return self._automaton.forced(self._state, MAX_FORCED)
        finally:
            self._budget -= self._automaton.work - before

    def _allow_work(self) -> int:
        """Lets the automaton, which other sequences use too, do what is left of the budget; the work it has done by now."""
        if self._budget < 0:
            raise GrammarTooCostly
        before = self._automaton.work
        self._automaton.limit = before + self._budget
        return before
