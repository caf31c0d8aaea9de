"""A grammar as rules over UTF-8 bytes, which is how the automaton walks it. Pure.

Its rule: what comes out is finite and small, whatever went in. Repetitions are written out up to a bound, and left recursion is
refused, so that the automaton may expand any rule without looking.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.llama_worker.structured.gbnf import (
    Class,
    GrammarError,
    Group,
    Literal,
    Node,
    Ranges,
    Reference,
    Repeat,
    read,
)
from gateway.llama_worker.structured.utf8 import byte_chains

MAX_POSITIONS = 60_000


@dataclass(frozen=True)
class Grammar:
    """Rules as a graph of positions. Position 0 is the end of an alternative.

    A position takes a byte out of `masks` (bit b = byte b), or, where its mask is 0, stands for the rule
    `rules[refs[position]]`, a tuple of positions where its alternatives begin. `following` is the position after it.
    """

    masks: list[int]
    refs: list[int]
    following: list[int]
    rules: list[tuple[int, ...]]
    start: int


def parse(text: str, root: str = "root") -> Grammar:
    """The grammar in `text`, which is GBNF; GrammarError says what is wrong with it."""
    named = read(text)
    if root not in named:
        raise GrammarError(f"The grammar has no rule `{root}`, which is where it begins.")
    builder = _Builder(named)
    start = builder.reference(root)
    grammar = Grammar(builder.masks, builder.refs, builder.following, builder.rules, start)
    _refuse_left_recursion(grammar, builder)
    return grammar


@dataclass
class _Builder:
    """Lays the named rules out; the arrays are those of `Grammar`."""

    named: dict[str, list[list[Node]]]
    masks: list[int] = field(default_factory=lambda: [0])
    refs: list[int] = field(default_factory=lambda: [0])
    following: list[int] = field(default_factory=lambda: [0])
    rules: list[tuple[int, ...]] = field(default_factory=list)
    loops: set[int] = field(default_factory=set)  # positions where a repetition goes round
    _numbers: dict[str, int] = field(default_factory=dict)
    _laid: dict[tuple[int, int, int], int] = field(default_factory=dict)  # what is the same is laid once
    _added: dict[tuple[int, ...], int] = field(default_factory=dict)
    _classes: dict[Ranges, int] = field(default_factory=dict)

    def reference(self, root: str) -> int:
        """A position that stands for the rule `root`, everything it needs laid out."""
        self._numbers = {name: number for number, name in enumerate(self.named)}
        self.rules = [()] * len(self.named)
        for name, alternatives in self.named.items():
            self.rules[self._numbers[name]] = self._lay_all(alternatives)
        return self._position(0, self._numbers[root], 0)

    def _lay_all(self, alternatives: list[list[Node]]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._lay(nodes, 0) for nodes in alternatives))

    def _lay(self, nodes: list[Node], after: int) -> int:
        for node in reversed(nodes):
            after = self._lay_one(node, after)
        return after

    def _lay_one(self, node: Node, after: int) -> int:
        match node:
            case Literal(data):
                for byte in reversed(data):
                    after = self._position(1 << byte, 0, after)
                return after
            case Class(ranges):
                return self._lay_class(ranges, after)
            case Reference(name, line):
                if name not in self._numbers:
                    raise GrammarError(f"The grammar is wrong on line {line}: there is no rule `{name}`.")
                return self._position(0, self._numbers[name], after)
            case Group([only]):
                return self._lay(only, after)
            case Group(alternatives):
                return self._position(0, self._add(self._lay_all(alternatives)), after)
            case Repeat():
                return self._lay_repeat(node, after)

    def _lay_class(self, ranges: Ranges, after: int) -> int:
        chains = byte_chains(ranges)
        if len(chains) == 1 and len(chains[0]) == 1:
            return self._position(chains[0][0], 0, after)
        if ranges not in self._classes:
            starts = []
            for chain in chains:
                start = 0
                for mask in reversed(chain):
                    start = self._position(mask, 0, start)
                starts.append(start)
            self._classes[ranges] = self._add(tuple(starts))
        return self._position(0, self._classes[ranges], after)

    def _lay_repeat(self, repeat: Repeat, after: int) -> int:
        item = self._add((self._lay([repeat.node], 0),))  # laid once, referred to each time
        if repeat.most is None:
            loop = len(self.rules)
            self.rules.append(())
            round_again = self._position(0, loop, 0)
            self.loops.add(round_again)
            self.rules[loop] = (self._position(0, item, round_again), 0)
            after = self._position(0, loop, after)
        else:
            optional = 0
            for _ in range(repeat.most - repeat.least):
                again = self._position(0, item, optional)
                optional = self._position(0, self._add((again, 0)), 0)
            if optional:
                after = self._position(0, self.refs[optional], after)
        for _ in range(repeat.least):
            after = self._position(0, item, after)
        return after

    def _add(self, starts: tuple[int, ...]) -> int:
        number = self._added.setdefault(starts, len(self.rules))
        if number == len(self.rules):
            self.rules.append(starts)
        return number

    def _position(self, mask: int, ref: int, after: int) -> int:
        number = self._laid.setdefault((mask, ref, after), len(self.masks))
        if number < len(self.masks):
            return number
        if len(self.masks) >= MAX_POSITIONS:
            raise GrammarError(
                f"The grammar needs more than {MAX_POSITIONS} elements when its repetitions are written out; make it smaller."
            )
        self.masks.append(mask)
        self.refs.append(ref)
        self.following.append(after)
        return number


def _refuse_left_recursion(grammar: Grammar, builder: _Builder) -> None:
    """Raises when a rule can begin with itself: it could be expanded without end. Linear in the grammar's size."""
    nullable = _nullable(grammar)
    edges: list[list[int]] = []
    for starts in grammar.rules:
        found = []
        for position in starts:
            while position and not grammar.masks[position]:
                # A repetition that goes round with nothing taken comes back to where it was: the automaton sees that.
                if position not in builder.loops:
                    found.append(grammar.refs[position])
                if not nullable[grammar.refs[position]]:
                    break
                position = grammar.following[position]
        edges.append(found)
    names = {number: name for name, number in builder._numbers.items()}
    state = [0] * len(edges)  # 1 = being visited, 2 = done
    for first in range(len(edges)):
        path = [(first, iter(edges[first]))] if not state[first] else []
        while path:
            rule, rest = path[-1]
            state[rule] = 1
            following = next(rest, None)
            if following is None:
                state[rule] = 2
                path.pop()
            elif state[following] == 1:
                shown = next((names[number] for number, _ in reversed(path) if number in names), "a group")
                raise GrammarError(
                    f"The grammar's rule `{shown}` begins with itself (left recursion); put a character first."
                )
            elif not state[following]:
                path.append((following, iter(edges[following])))


def _nullable(grammar: Grammar) -> list[bool]:
    """Which rules may match nothing at all."""
    nullable = [False] * len(grammar.rules)
    waiting: dict[int, list[tuple[int, int]]] = {}  # rule → (position, rule that it belongs to) to go on from
    work = [(position, rule) for rule, starts in enumerate(grammar.rules) for position in starts]
    while work:
        position, rule = work.pop()
        if nullable[rule]:
            continue
        while position and not grammar.masks[position] and nullable[grammar.refs[position]]:
            position = grammar.following[position]
        if position == 0:
            nullable[rule] = True
            work += waiting.pop(rule, [])
        elif not grammar.masks[position]:
            waiting.setdefault(grammar.refs[position], []).append((position, rule))
    return nullable
