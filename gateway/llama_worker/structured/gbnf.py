"""GBNF, llama.cpp's grammar language, as rules over UTF-8 bytes. Pure.

Its rule: what comes out is finite and small, whatever went in. Size, nesting and repetition are bounded while reading, and
left recursion is refused, so that the automaton may expand any rule without looking.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.errors import RequestError
from gateway.llama_worker.structured.utf8 import MAX_CODE_POINT, byte_chains

PARAM = "structured_outputs"
MAX_TEXT = 256 * 1024
MAX_POSITIONS = 60_000
MAX_NESTING = 64
MAX_REPETITIONS = 20_000

Ranges = tuple[tuple[int, int], ...]  # code points, both ends included


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


class GrammarError(RequestError):
    """A grammar that is wrong, or too large to hold."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param=PARAM)


def parse(text: str, root: str = "root") -> Grammar:
    """The grammar in `text`; GrammarError says what is wrong and on which line."""
    if len(text) > MAX_TEXT:
        raise GrammarError(f"The grammar has {len(text)} characters; at most {MAX_TEXT} are taken.")
    named = _Reader(text).rules()
    if root not in named:
        raise GrammarError(f"The grammar has no rule `{root}`, which is where it begins.")
    builder = _Builder(named)
    start = builder.reference(root)
    grammar = Grammar(builder.masks, builder.refs, builder.following, builder.rules, start)
    _refuse_left_recursion(grammar, builder)
    return grammar


# What the text says, as a tree


@dataclass(frozen=True)
class _Literal:
    data: bytes


@dataclass(frozen=True)
class _Class:
    ranges: Ranges


@dataclass(frozen=True)
class _Reference:
    name: str
    line: int


@dataclass(frozen=True)
class _Group:
    alternatives: list[list[_Node]]


@dataclass(frozen=True)
class _Repeat:
    node: _Node
    least: int
    most: int | None


_Node = _Literal | _Class | _Reference | _Group | _Repeat
_ESCAPES = {"t": 9, "r": 13, "n": 10, "\\": 92, '"': 34, "[": 91, "]": 93}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Reader:
    """Recursive descent over the text."""

    def __init__(self, text: str) -> None:
        self._text = text + "\0"  # a sentinel that nothing matches
        self._at = 0
        self._counted = (0, 1)  # up to where newlines were counted, and the line there

    def rules(self) -> dict[str, list[list[_Node]]]:
        found: dict[str, list[list[_Node]]] = {}
        self._skip(newlines=True)
        while not self._ended():
            name = self._name()
            self._skip(newlines=False)
            if not self._text.startswith("::=", self._at):
                raise self._error(f"`::=` is missing after the rule name `{name}`")
            self._at += 3
            self._skip(newlines=True)
            if name in found:
                raise self._error(f"the rule `{name}` is defined twice")
            found[name] = self._alternatives(0)
            if not self._ended() and self._text[self._at] not in "\r\n":
                raise self._error(f"{self._text[self._at]!r} is not expected here")
            self._skip(newlines=True)
        return found

    def _alternatives(self, depth: int) -> list[list[_Node]]:
        if depth > MAX_NESTING:
            raise self._error(f"parentheses are nested deeper than {MAX_NESTING}")
        found = [self._sequence(depth)]
        while self._text[self._at] == "|":
            self._at += 1
            self._skip(newlines=True)
            found.append(self._sequence(depth))
        return found

    def _sequence(self, depth: int) -> list[_Node]:
        nodes: list[_Node] = []
        while True:
            char = self._text[self._at]
            if char == '"':
                nodes.append(self._literal())
            elif char == "[":
                nodes.append(self._class())
            elif char == ".":
                self._at += 1
                nodes.append(_Class(((0, MAX_CODE_POINT),)))
            elif char == "(":
                self._at += 1
                self._skip(newlines=True)
                nodes.append(_Group(self._alternatives(depth + 1)))
                if self._text[self._at] != ")":
                    raise self._error("`)` is missing")
                self._at += 1
            elif char in _REPEATS or char == "{":
                least, most = self._repetition()
                if not nodes:
                    raise self._error(f"{char!r} has nothing before it to repeat")
                if isinstance(nodes[-1], _Repeat):
                    raise self._error(f"{char!r} follows another repetition; put parentheses around that")
                nodes.append(_Repeat(nodes.pop(), least, most))
            elif char in "<!":
                raise self._error("tokens by name or id (`<…>`) are not supported; write their characters")
            elif _is_word(char):
                line = self._line()
                nodes.append(_Reference(self._name(), line))
            else:
                return nodes
            self._skip(newlines=depth > 0)

    def _repetition(self) -> tuple[int, int | None]:
        char = self._text[self._at]
        self._at += 1
        if char != "{":
            return _REPEATS[char]
        end = self._text.find("}", self._at)
        least, comma, most = self._text[self._at : end if end >= 0 else self._at].partition(",")
        least, most = least.strip(), most.strip()
        if not _is_count(least) or (most and not _is_count(most)):
            raise self._error("a repetition is {N}, {N,} or {N,M}, with numbers of at most five digits")
        self._at = end + 1
        upper = int(most) if most else (None if comma else int(least))
        if int(least) > MAX_REPETITIONS or (upper or 0) > MAX_REPETITIONS:
            raise self._error(f"something is repeated more than {MAX_REPETITIONS} times")
        if upper is not None and upper < int(least):
            raise self._error(f"a repetition of at least {int(least)} and at most {upper} is impossible")
        return int(least), upper

    def _literal(self) -> _Literal:
        self._at += 1
        parts = []
        while (char := self._text[self._at]) != '"':
            self._refuse_end(char, 'a literal has no closing `"`')
            parts.append(chr(self._code_point()))
        self._at += 1
        try:
            return _Literal("".join(parts).encode())
        except UnicodeEncodeError:
            raise self._error("a literal holds half a surrogate pair, which no text has") from None

    def _class(self) -> _Class:
        self._at += 1
        negated = self._text[self._at] == "^"
        self._at += negated
        ranges = []
        while (char := self._text[self._at]) != "]":
            self._refuse_end(char, "a character class has no closing `]`")
            low = high = self._code_point()
            if self._text[self._at] == "-" and self._text[self._at + 1] != "]":
                self._at += 1
                self._refuse_end(self._text[self._at], "a character class has no closing `]`")
                high = self._code_point()
            ranges.append((low, high))
        self._at += 1
        return _Class(_complement(ranges) if negated else tuple(sorted(ranges)))

    def _code_point(self) -> int:
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return ord(char)
        kind = self._text[self._at]
        self._at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        digits = self._text[self._at : self._at + _HEX_ESCAPES.get(kind, 0)]
        if kind not in _HEX_ESCAPES or len(digits) < _HEX_ESCAPES[kind] or not _is_hex(digits):
            raise self._error(
                f'`\\{kind}` is no escape; there are \\x41 \\u0041 \\U00000041 \\n \\r \\t \\\\ \\" \\[ \\]'
            )
        self._at += len(digits)
        return min(int(digits, 16), MAX_CODE_POINT)

    def _name(self) -> str:
        start = self._at
        while _is_word(self._text[self._at]):
            self._at += 1
        if self._at == start:
            raise self._error("a rule's name is missing")
        return self._text[start : self._at]

    def _skip(self, newlines: bool) -> None:
        while True:
            char = self._text[self._at]
            if char == "#":
                while self._text[self._at] not in "\r\n" and not self._ended():
                    self._at += 1
            elif char in " \t" or (newlines and char in "\r\n"):
                self._at += 1
            else:
                return

    def _ended(self) -> bool:
        return self._at >= len(self._text) - 1

    def _refuse_end(self, char: str, message: str) -> None:
        if char == "\0" and self._ended():
            raise self._error(message)

    def _line(self) -> int:
        at, line = self._counted
        self._counted = (self._at, line + self._text.count("\n", at, self._at))
        return self._counted[1]

    def _error(self, message: str) -> GrammarError:
        return GrammarError(f"The grammar is wrong on line {self._line()}: {message}.")


# The tree as positions


@dataclass
class _Builder:
    """Lays the named rules out; the arrays are those of `Grammar`."""

    named: dict[str, list[list[_Node]]]
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

    def _lay_all(self, alternatives: list[list[_Node]]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._lay(nodes, 0) for nodes in alternatives))

    def _lay(self, nodes: list[_Node], after: int) -> int:
        for node in reversed(nodes):
            after = self._lay_one(node, after)
        return after

    def _lay_one(self, node: _Node, after: int) -> int:
        match node:
            case _Literal(data):
                for byte in reversed(data):
                    after = self._position(1 << byte, 0, after)
                return after
            case _Class(ranges):
                return self._lay_class(ranges, after)
            case _Reference(name, line):
                if name not in self._numbers:
                    raise GrammarError(f"The grammar is wrong on line {line}: there is no rule `{name}`.")
                return self._position(0, self._numbers[name], after)
            case _Group([only]):
                return self._lay(only, after)
            case _Group(alternatives):
                return self._position(0, self._add(self._lay_all(alternatives)), after)
            case _Repeat():
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

    def _lay_repeat(self, repeat: _Repeat, after: int) -> int:
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


def _complement(ranges: list[tuple[int, int]]) -> Ranges:
    found, low = [], 0
    for first, last in sorted(ranges):
        if first > low:
            found.append((low, first - 1))
        low = max(low, last + 1)
    if low <= MAX_CODE_POINT:
        found.append((low, MAX_CODE_POINT))
    return tuple(found)


def _is_word(char: str) -> bool:
    return char.isascii() and (char.isalnum() or char == "-")


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5


def _is_hex(text: str) -> bool:
    return all(char in "0123456789abcdefABCDEF" for char in text)
