"""Calls such as `remind(task="feed the cat", when="tonight")`: parsing them out of whatever a model says, and scoring.

One rule: what a model says is never run, and no text makes the parser fail: it is a call or it is not.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """A function's name and its arguments by name, each value as text."""

    name: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class Score:
    """Shares between 0 and 1 over COUNT requests."""

    count: int
    exact: float
    call: float
    function: float


def parse_call(text: str) -> Call | None:
    """The one call that TEXT is, or None. Positional arguments, nesting and unpacking make it no call of ours."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        return None
    arguments: dict[str, str] = {}
    for keyword in node.keywords:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            return None
        arguments[keyword.arg] = str(keyword.value.value)
    return Call(node.func.id, arguments)


def same_call(said: str, wanted: str) -> bool:
    """Whether both are calls of the same function with the same arguments, in any order."""
    call = parse_call(said)
    return call is not None and call == parse_call(wanted)


def same_function(said: str, wanted: str) -> bool:
    """Whether SAID calls the function that WANTED calls, with whatever arguments, complete or cut off."""
    name, opening, _ = said.strip().partition("(")
    return opening == "(" and name == wanted.strip().partition("(")[0]


def score(said: Sequence[str], wanted: Sequence[str]) -> Score:
    """How well the replies do against the wanted ones, pair by pair."""
    pairs = list(zip(said, wanted, strict=True))
    count = max(len(pairs), 1)
    return Score(
        count=len(pairs),
        exact=sum(one.strip() == other.strip() for one, other in pairs) / count,
        call=sum(same_call(one, other) for one, other in pairs) / count,
        function=sum(same_function(one, other) for one, other in pairs) / count,
    )
