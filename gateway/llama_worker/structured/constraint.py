"""Which of a model's tokens a grammar allows next. On the decode loop's thread.

Its rule: the tokens that the sampler likes best are checked first; only where they are refused are all of them looked at, and
what a state of the grammar allows is then kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from gateway.llama_worker.structured.automaton import DEAD, Automaton, GrammarTooCostly
from gateway.llama_worker.structured.rules import Grammar
from gateway.llama_worker.structured.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]

WORK_A_TOKEN = 4_000  # units of the automaton's work that a token earns (about 2 ms)
WORK_AT_ONCE = 40_000  # that may be saved up for a harder one
KEPT = 64  # states whose allowed tokens a structure remembers, a bit a token: 19 KB each where there are 150,000


class Followers:
    """The states of a grammar, and which tokens of a vocabulary may follow those that were asked for lately."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary) -> None:
        self.automaton = automaton
        self.vocabulary = vocabulary
        self._kept: OrderedDict[int, npt.NDArray[np.uint8]] = OrderedDict()

    def of(self, state: int) -> npt.NDArray[np.bool_]:
        """Of each token, whether it may follow; GrammarTooCostly."""
        packed = self._kept.get(state)
        if packed is not None:
            self._kept.move_to_end(state)
            return np.unpackbits(packed, count=len(self.vocabulary.pieces)).view(np.bool_)
        found = self.vocabulary.allowed(self.automaton, state)
        self._kept[state] = np.packbits(found)
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def rebuilt(self, state: int) -> tuple[Followers, int]:
        """The same with nothing remembered, and the number that `state` has in it."""
        automaton, state = self.automaton.rebuilt(state)
        return Followers(automaton, self.vocabulary), state


class Structure:
    """A compiled grammar for one vocabulary; any number of sequences are held to it at the same time."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._followers = Followers(Automaton(grammar), vocabulary)

    def constraint(self, end_ids: Iterable[int]) -> Constraint:
        """One sequence at its beginning; `end_ids` are the tokens that end it."""
        if self._followers.automaton.full:
            self._followers = Followers(Automaton(self._grammar), self._followers.vocabulary)
        return Constraint(self._followers, frozenset(end_ids))


class Constraint:
    """How far one sequence has come in its grammar."""

    def __init__(self, followers: Followers, end_ids: frozenset[int]) -> None:
        self._followers, self._end_ids = followers, end_ids
        self._pieces = followers.vocabulary.pieces
        self._state = followers.automaton.start
        self._budget = WORK_AT_ONCE

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._automaton.is_over(self._state)

    def begin(self) -> None:
        """Call before the questions about each token: it grants them their work."""
        self._budget = min(WORK_AT_ONCE, self._budget + WORK_A_TOKEN)

    def allows(self, token: int) -> bool:
        """Whether `token` may come next. Raises GrammarTooCostly."""
        if token in self._end_ids and self._automaton.accepts(self._state):
            return True
        return bool(self._pieces[token]) and self._run(self._pieces[token]) != DEAD

    def allowed(self) -> Ids:
        """The ids of all tokens that may come next, ascending. Raises GrammarTooCostly."""
        before = self._allow_work()
        try:
            found = self._followers.of(self._state)
        finally:
            self._budget -= self._automaton.work - before
        if self._automaton.accepts(self._state):
            found[list(self._end_ids)] = True
        return np.flatnonzero(found)

    def accept(self, token: int) -> None:
        """Goes on with a token that `allows` or `allowed` has allowed."""
        state = self._run(self._pieces[token]) if self._pieces[token] else DEAD
        if state == DEAD:
            return  # a token that ends the text
        self._state = state
        if self._automaton.full:
            self._followers, self._state = self._followers.rebuilt(state)

    @property
    def _automaton(self) -> Automaton:
        return self._followers.automaton

    def _run(self, piece: bytes) -> int:
        before = self._allow_work()
        try:
            return self._automaton.run(self._state, piece)[0]
        finally:
            self._budget -= self._automaton.work - before

    def _allow_work(self) -> int:
        """Lets the automaton, which other sequences use too, do what is left of the budget; the work it has done by now."""
        if self._budget < 0:
            raise GrammarTooCostly
        before = self._automaton.work
        self._automaton.limit = before + self._budget
        return before
