"""A model's tokens as a tree of their bytes, and the walk that finds all that a grammar allows next. Pure.

Its rule: tokens that begin alike are looked at once. What they share is walked together, a level of the tree at a time, in
numpy; the automaton is asked once for each of its states and each byte that comes there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gateway.llama_worker.structured.automaton import DEAD, Automaton

Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int32]

BYTES = 256
NODES_A_UNIT = 64  # beginnings that are looked at for one unit of the automaton's work


@dataclass(frozen=True)
class _Level:
    """The beginnings of one length, in the order of their bytes. Places are those of a level."""

    last_bytes: npt.NDArray[np.uint8]
    tokens: Places  # the token that each is all of, or the size of the vocabulary
    firsts: Places  # for each place of the level before, where those begin here that go on from it; and the end


class Vocabulary:
    """The bytes of each token, empty where it is no text (control tokens), and the tree of their beginnings."""

    def __init__(self, pieces: list[bytes]) -> None:
        """Some tenths of a second for a large vocabulary."""
        self.pieces = pieces
        spoken = np.array([token for token, piece in enumerate(pieces) if piece], dtype=np.int32)
        spoken = spoken[sorted(range(len(spoken)), key=[pieces[token] for token in spoken].__getitem__)]
        self._levels: list[_Level] = []
        self._twins = np.empty((2, 0), dtype=np.int32)  # tokens whose bytes an earlier one has, and that one
        self._grow(spoken)

    def allowed(self, automaton: Automaton, state: int) -> Flags:
        """Of each token, whether it is text that may come next; GrammarTooCostly past the automaton's limit."""
        found = np.zeros(len(self.pieces) + 1, dtype=np.bool_)  # the last is for beginnings that are no token
        states = [state]
        here = np.zeros(1, dtype=np.intp)  # the beginnings that are allowed, and in which of the states they end
        where = np.zeros(1, dtype=np.intp)
        for level in self._levels:
            firsts = level.firsts[here]
            counts = level.firsts[here + 1] - firsts
            size = int(counts.sum())
            if not size:
                break
            automaton.charge(size // NODES_A_UNIT)
            here = np.repeat(firsts - np.cumsum(counts) + counts, counts) + np.arange(size)
            steps = np.repeat(where * BYTES, counts) + level.last_bytes[here]
            states, after = _take(automaton, states, steps)
            where = after[steps]
            alive = np.flatnonzero(where >= 0)
            here, where = here[alive], where[alive]
            found[level.tokens[here]] = True
        found[self._twins[0]] = found[self._twins[1]]
        return found[:-1]

    def _grow(self, spoken: Places) -> None:
        """Builds the levels; `spoken` are the tokens in the order of their bytes."""
        sizes = np.array([len(self.pieces[token]) for token in spoken], dtype=np.int64)
        text = np.frombuffer(b"".join(self.pieces[token] for token in spoken), dtype=np.uint8)
        starts = np.cumsum(sizes) - sizes
        rows = np.arange(len(spoken))  # of the tokens that are longer than the level is deep
        alike = rows > 0  # whether the token before begins with the same bytes
        nodes = np.zeros(len(spoken), dtype=np.int32)  # where in the level before each begins
        twins = [self._twins]
        levels: list[_Level] = []
        parents = 1
        while len(rows):
            depth, before = len(levels), np.maximum(rows - 1, 0)
            last = text[starts[rows] + depth]
            same = alike[rows] & (sizes[before] > depth) & (last == text[starts[before] + depth])
            alike[rows] = same
            longer = np.searchsorted(nodes[rows[~same]], np.arange(parents + 1)).astype(np.int32)
            nodes[rows] = np.cumsum(~same) - 1
            parents = int(np.count_nonzero(~same))
            ending = rows[sizes[rows] == depth + 1]
            tokens = np.full(parents, len(self.pieces), dtype=np.int32)
            tokens[nodes[ending][::-1]] = spoken[ending][::-1]  # of twins, the first stays
            twins.append(np.stack([spoken[ending], tokens[nodes[ending]]])[:, spoken[ending] != tokens[nodes[ending]]])
            levels.append(_Level(last[~same], tokens, longer))
            rows = rows[sizes[rows] > depth + 1]
        self._levels = levels
        self._twins = np.concatenate(twins, axis=1)


def _take(
    automaton: Automaton, states: list[int], steps: npt.NDArray[np.intp]
) -> tuple[list[int], npt.NDArray[np.intp]]:
    """The states after `steps` (place of a state × BYTES + byte), each once, and for each step its place, -1 for DEAD."""
    asked = np.zeros(len(states) * BYTES, dtype=np.bool_)
    asked[steps] = True
    after = np.full(len(asked), -1, dtype=np.intp)
    places: dict[int, int] = {}
    for step in np.flatnonzero(asked).tolist():
        following = automaton.step(states[step // BYTES], step % BYTES)
        if following != DEAD:
            after[step] = places.setdefault(following, len(places))
    return list(places), after
