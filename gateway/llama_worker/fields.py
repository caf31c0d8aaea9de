"""Reading a request's fields: each reader returns a value of its type or raises RequestError that names the field. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """What a request is held against."""

    max_model_len: int
    max_num_seqs: int
    vocab_size: int


def parse_body(body: bytes) -> dict[str, Any]:
    """The body as a JSON object, or a RequestError."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise RequestError(f"The body is a JSON {type(fields).__name__}; it must be an object.")
    return fields


def ids(value: object, name: str, limits: Limits, most: int) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > most:
        raise RequestError(f"{name} is {show(value)}; it must be a list of at most {most} token ids.", param=name)
    for item in value:
        if type(item) is not int or not 0 <= item < limits.vocab_size:
            raise RequestError(
                f"{name} holds {show(item)}; a token id of this model is an integer from 0 to {limits.vocab_size - 1}.",
                param=name,
            )
    return value


def number(
    fields: dict[str, Any], name: str, default: float, low: float, high: float, above_low: bool = False
) -> float:
    value = fields.get(name)
    if value is None:
        return default
    right_type = type(value) in (int, float)
    if not right_type or not math.isfinite(value) or not low <= value <= high or (above_low and value == low):
        bounds = f"{'above' if above_low else 'from'} {low:g} {'up ' if above_low else ''}to {high:g}"
        raise RequestError(f"{name} is {show(value)}; it must be a number {bounds}.", param=name)
    return float(value)


def integer(fields: dict[str, Any], name: str, default: int, low: int, high: int | None) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or value < low or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise RequestError(f"{name} is {show(value)}; it must be an integer {bounds}.", param=name)
    return value


def optional_integer(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    return None if fields.get(name) is None else integer(fields, name, 0, low, high)


def boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if type(value) is not bool:
        raise RequestError(f"{name} is {show(value)}; it must be true or false.", param=name)
    return value


def text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise RequestError(f"{name} is {show(value)}; it must be a string that is not empty.", param=name)
    return value


def show(value: object) -> str:
    if isinstance(value, (list, dict)) and value:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
