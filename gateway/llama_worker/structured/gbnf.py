"""GBNF, llama.cpp's grammar language, as a tree of rules. Pure.

Its rule: the text may be anybody's, so its size, nesting and repetitions are bounded while it is read, and what is wrong is
told with its line.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.errors import RequestError
from gateway.llama_worker.structured.utf8 import MAX_CODE_POINT

PARAM = "structured_outputs"
MAX_TEXT = 256 * 1024
MAX_NESTING = 64
MAX_REPETITIONS = 20_000

Ranges = tuple[tuple[int, int], ...]  # code points, both ends included


class GrammarError(RequestError):
    """A grammar that is wrong, or too large to hold."""

    def __init__(self, message: str) -> None:
        super().__init__(message, param=PARAM)


def read(text: str) -> dict[str, list[list[Node]]]:
    """The rules in `text`, each as its alternatives; GrammarError says what is wrong and on which line."""
    if len(text) > MAX_TEXT:
        raise GrammarError(f"The grammar has {len(text)} characters; at most {MAX_TEXT} are taken.")
    return _Reader(text).rules()


@dataclass(frozen=True)
class Literal:
    data: bytes


@dataclass(frozen=True)
class Class:
    ranges: Ranges


@dataclass(frozen=True)
class Reference:
    name: str
    line: int


@dataclass(frozen=True)
class Group:
    alternatives: list[list[Node]]


@dataclass(frozen=True)
class Repeat:
    node: Node
    least: int
    most: int | None


Node = Literal | Class | Reference | Group | Repeat
_ESCAPES = {"t": 9, "r": 13, "n": 10, "\\": 92, '"': 34, "[": 91, "]": 93}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class _Reader:
    """Recursive descent over the text."""

    def __init__(self, text: str) -> None:
        self._text = text + "\0"  # a sentinel that nothing matches
        self._at = 0
        self._counted = (0, 1)  # up to where newlines were counted, and the line there

    def rules(self) -> dict[str, list[list[Node]]]:
        found: dict[str, list[list[Node]]] = {}
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

    def _alternatives(self, depth: int) -> list[list[Node]]:
        if depth > MAX_NESTING:
            raise self._error(f"parentheses are nested deeper than {MAX_NESTING}")
        found = [self._sequence(depth)]
        while self._text[self._at] == "|":
            self._at += 1
            self._skip(newlines=True)
            found.append(self._sequence(depth))
        return found

    def _sequence(self, depth: int) -> list[Node]:
        nodes: list[Node] = []
        while True:
            char = self._text[self._at]
            if char == '"':
                nodes.append(self._literal())
            elif char == "[":
                nodes.append(self._class())
            elif char == ".":
                self._at += 1
                nodes.append(Class(((0, MAX_CODE_POINT),)))
            elif char == "(":
                self._at += 1
                self._skip(newlines=True)
                nodes.append(Group(self._alternatives(depth + 1)))
                if self._text[self._at] != ")":
                    raise self._error("`)` is missing")
                self._at += 1
            elif char in _REPEATS or char == "{":
                least, most = self._repetition()
                if not nodes:
                    raise self._error(f"{char!r} has nothing before it to repeat")
                if isinstance(nodes[-1], Repeat):
                    raise self._error(f"{char!r} follows another repetition; put parentheses around that")
                nodes.append(Repeat(nodes.pop(), least, most))
            elif char in "<!":
                raise self._error("tokens by name or id (`<…>`) are not supported; write their characters")
            elif _is_word(char):
                line = self._line()
                nodes.append(Reference(self._name(), line))
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

    def _literal(self) -> Literal:
        self._at += 1
        parts = []
        while (char := self._text[self._at]) != '"':
            self._refuse_end(char, 'a literal has no closing `"`')
            parts.append(chr(self._code_point()))
        self._at += 1
        try:
            return Literal("".join(parts).encode())
        except UnicodeEncodeError:
            raise self._error("a literal holds half a surrogate pair, which no text has") from None

    def _class(self) -> Class:
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
                if high < low:
                    raise self._error("a range of a character class ends before it begins")
            ranges.append((low, high))
        self._at += 1
        return Class(_complement(ranges) if negated else tuple(sorted(ranges)))

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
