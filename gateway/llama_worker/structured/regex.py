"""A regular expression as GBNF. Pure. The syntax is what JavaScript and Python share; what only looks around is refused."""

from __future__ import annotations

import re
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from gateway.llama_worker.structured.gbnf import MAX_REPETITIONS
from gateway.llama_worker.structured.spelling import (
    CharRanges,
    char_class,
    complement,
    json_class,
    json_text,
    normalise,
    quote,
)
from gateway.llama_worker.structured.utf8 import MAX_CODE_POINT

MAX_PATTERN = 2000
MAX_NESTING = 50

_CATEGORIES: dict[Any, CharRanges] = {
    op.CATEGORY_DIGIT: [(48, 57)],
    op.CATEGORY_WORD: [(48, 57), (65, 90), (95, 95), (97, 122)],
    op.CATEGORY_SPACE: [(9, 13), (32, 32)],
}
_CATEGORIES |= {
    op.CATEGORY_NOT_DIGIT: complement(_CATEGORIES[op.CATEGORY_DIGIT]),
    op.CATEGORY_NOT_WORD: complement(_CATEGORIES[op.CATEGORY_WORD]),
    op.CATEGORY_NOT_SPACE: complement(_CATEGORIES[op.CATEGORY_SPACE]),
}
_BEGIN, _END = (op.AT, op.AT_BEGINNING), (op.AT, op.AT_END)


class UnsupportedRegex(ValueError):
    """What in a pattern cannot be held to, in words."""


def regex_to_gbnf(pattern: str, *, in_json_string: bool = False, whole: bool = True) -> str:
    """A GBNF expression for the texts that match all of `pattern`; with `whole` false, for those that contain a match.

    `in_json_string` spells them as the inside of a JSON string. Raises UnsupportedRegex.
    """
    if len(pattern) > MAX_PATTERN:
        raise UnsupportedRegex(f"the pattern has {len(pattern)} characters; at most {MAX_PATTERN} are taken")
    try:
        parsed = _parser.parse(_named_groups(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsupportedRegex(f"the pattern is not valid: {error}") from None
    if parsed.state.flags & ~re.UNICODE:
        raise UnsupportedRegex("flags such as (?i) are not supported")
    nodes = list(parsed)
    from_begin, to_end = nodes[:1] == [_BEGIN], nodes[-1:] == [_END]
    nodes = nodes[from_begin : len(nodes) - to_end if to_end else None]
    writer = _Writer(in_json_string)
    body = writer.sequence(nodes, 0)
    anything = writer.any_of([(0, MAX_CODE_POINT)]) + "*"
    before = "" if whole or from_begin else anything + " "
    after = "" if whole or to_end else " " + anything
    return f"{before}{body}{after}"


def _named_groups(pattern: str) -> str:
    return re.sub(r"\(\?<(?=[A-Za-z_])", "(?P<", pattern)  # as JavaScript writes them


class _Writer:
    def __init__(self, in_json_string: bool) -> None:
        self._json = in_json_string

    def sequence(self, nodes: Any, depth: int) -> str:
        if depth > MAX_NESTING:
            raise UnsupportedRegex(f"groups are nested deeper than {MAX_NESTING}")
        return " ".join(self._node(node, depth) for node in nodes) or '""'

    def any_of(self, ranges: CharRanges) -> str:
        return json_class(ranges) if self._json else char_class(ranges)

    def _node(self, node: Any, depth: int) -> str:
        kind, value = node
        if kind is op.LITERAL:
            return quote(json_text(chr(value)) if self._json else chr(value))
        if kind is op.NOT_LITERAL:
            return self.any_of(complement([(value, value)]))
        if kind is op.ANY:
            return self.any_of(complement([(10, 10), (13, 13)]))
        if kind is op.IN:
            return self.any_of(_set(value))
        if kind is op.BRANCH:
            return "(" + " | ".join(self.sequence(branch, depth + 1) for branch in value[1]) + ")"
        if kind is op.SUBPATTERN:
            _, added, removed, inner = value
            if added or removed:
                raise UnsupportedRegex("flags such as (?i) are not supported")
            return "(" + self.sequence(inner, depth + 1) + ")"
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            least, most, inner = value
            if least > MAX_REPETITIONS or (most is not op.MAXREPEAT and most > MAX_REPETITIONS):
                raise UnsupportedRegex(f"something is repeated more than {MAX_REPETITIONS} times")
            upper = "" if most is op.MAXREPEAT else int(most)
            return "(" + self.sequence(inner, depth + 1) + f"){{{int(least)},{upper}}}"
        raise UnsupportedRegex(f"{_NAMES.get(kind, str(kind).lower())} is not supported")


_NAMES = {
    op.AT: "an anchor (^, $, \\b) inside the pattern",
    op.ASSERT: "looking ahead or behind",
    op.ASSERT_NOT: "looking ahead or behind",
    op.GROUPREF: "a reference to a group",
    op.GROUPREF_EXISTS: "a condition",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive repetition",
}


def _set(items: Any) -> CharRanges:
    ranges: CharRanges = []
    negated = False
    for kind, value in items:
        if kind is op.NEGATE:
            negated = True
        elif kind is op.LITERAL:
            ranges.append((value, value))
        elif kind is op.RANGE:
            ranges.append(value)
        else:
            ranges += _CATEGORIES[value]
    return complement(ranges) if negated else normalise(ranges)
