"""Arithmetic over the scores of several graders: `calculate_output` of a multi grader. Pure.

Its one rule: nothing is evaluated but the nodes that are listed here, over floats, in a formula of bounded size.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARS = 1000
MAX_NODES = 200
FUNCTIONS: Mapping[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: math.pow,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class FormulaError(ValueError):
    """A formula that is none, or has no value; says why."""


def parse_formula(text: str) -> ast.expr:
    """The formula, checked. Raises FormulaError."""
    if len(text) > MAX_CHARS:
        raise FormulaError(f"it has {len(text)} characters; at most {MAX_CHARS} are taken")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormulaError(f"it is no formula: {error}") from error
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise FormulaError(f"it has more than {MAX_NODES} parts")
    _check(tree)
    return tree


def names_in(formula: ast.expr) -> set[str]:
    """The scores that a formula needs."""
    called = {id(node.func) for node in ast.walk(formula) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(formula) if isinstance(node, ast.Name) and id(node) not in called}


def evaluate(formula: ast.expr, scores: Mapping[str, float]) -> float:
    """The value of a checked formula. Raises FormulaError where it has none: a division by 0, an unknown name."""
    try:
        value = float(_value(formula, scores))
    except (ArithmeticError, ValueError, TypeError) as error:
        raise FormulaError(f"it has no value here: {error}") from error
    if not math.isfinite(value):
        raise FormulaError(f"its value is {value}")
    return value


def _check(node: ast.expr) -> None:
    match node:
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            _check(left)
            _check(right)
        case ast.UnaryOp(op, operand) if type(op) in _UNARY:
            _check(operand)
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS and arguments:
            for argument in arguments:
                _check(argument)
        case ast.Name() | ast.Constant(int() | float()) if not isinstance(getattr(node, "value", None), bool):
            pass
        case _:
            known = ", ".join(FUNCTIONS)
            raise FormulaError(
                f"it holds {ast.unparse(node)[:60]!r}; it may hold numbers, names, + - * / ** and {known}"
            )


def _value(node: ast.expr, scores: Mapping[str, float]) -> float:
    match node:
        case ast.BinOp(left, op, right):
            return _BINARY[type(op)](_value(left, scores), _value(right, scores))
        case ast.UnaryOp(op, operand):
            return _UNARY[type(op)](_value(operand, scores))
        case ast.Call(ast.Name(name), arguments):
            values: list[Any] = [_value(argument, scores) for argument in arguments]
            return float(FUNCTIONS[name](*values) if len(values) > 1 or name not in ("min", "max") else values[0])
        case ast.Constant(value):
            return float(value)  # type: ignore[arg-type]
        case ast.Name(name) if name in scores:
            return float(scores[name])
        case ast.Name(name):
            raise FormulaError(f"it needs '{name}', which no grader gives")
    raise AssertionError(node)
