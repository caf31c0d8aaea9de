"""Reading the fields of a request body: each reader returns a value of its type or raises RequestError naming the field."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from gateway.errors import RequestError

Body = Mapping[str, Any]


def integer(body: Body, name: str, low: int, high: int) -> int | None:
    """A whole number between the bounds, or None when absent or null. Booleans are no numbers."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"'{name}' must be an integer, not {show(value)}", param=name)
    if not low <= value <= high:
        raise RequestError(f"'{name}' must be between {low} and {high}, not {value}", param=name)
    return value


def number(body: Body, name: str, low: float, high: float) -> float | None:
    """A finite number between the bounds, or None when absent or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"'{name}' must be a number, not {show(value)}", param=name)
    if not low <= value <= high:
        raise RequestError(f"'{name}' must be between {low:g} and {high:g}, not {value}", param=name)
    return float(value)


def boolean(body: Body, name: str) -> bool | None:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return value
    raise RequestError(f"'{name}' must be true or false, not {show(value)}", param=name)


def string(body: Body, name: str, longest: int = 1_000_000) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(f"'{name}' must be a string, not {show(value)}", param=name)
    if len(value) > longest:
        raise RequestError(f"'{name}' has {len(value)} characters; at most {longest} are taken", param=name)
    return value


def required_string(body: Body, name: str, longest: int = 1_000_000) -> str:
    value = string(body, name, longest)
    if not value:
        raise RequestError(f"you must provide '{name}', a string that is not empty", param=name)
    return value


def stops(body: Body) -> tuple[str, ...]:
    """`stop`: nothing, a string, or up to four."""
    value = body.get("stop")
    if value is None:
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(stop, str) for stop in listed):
        raise RequestError(f"'stop' must be a string or a list of strings, not {show(value)}", param="stop")
    if len(listed) > 4:
        raise RequestError(f"'stop' has {len(listed)} entries; at most 4 are taken", param="stop")
    for stop in listed:
        if not 1 <= len(stop) <= 1000:
            raise RequestError(f"each 'stop' has 1 to 1000 characters; one has {len(stop)}", param="stop")
    return tuple(listed)


def texts_or_ids(body: Body, name: str, most: int) -> list[str | list[int]]:
    """A text, a list of texts, token ids, or a list of such lists, as a list of what each stands for; none empty."""
    value = body.get(name)
    if isinstance(value, str) and value:
        return [value]
    if isinstance(value, list) and value:
        if all(map(is_token_id, value)):
            return [value]
        if len(value) > most:
            raise RequestError(f"'{name}' has {len(value)} entries; at most {most} are taken", param=name)
        if all(isinstance(item, str) and item for item in value):
            return list(value)
        if all(isinstance(item, list) and item and all(map(is_token_id, item)) for item in value):
            return list(value)
    raise RequestError(
        f"'{name}' must be a text, a list of texts, a list of token ids, or a list of such lists, none empty, "
        f"not {show(value)}",
        param=name,
    )


def token_ids(body: Body, name: str, most: int) -> tuple[int, ...]:
    """A list of token ids, empty when absent or null."""
    value = body.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > most or not all(map(is_token_id, value)):
        raise RequestError(f"'{name}' must be a list of at most {most} token ids, not {show(value)}", param=name)
    return tuple(value)


def is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def logit_bias(body: Body) -> dict[str, float]:
    """`logit_bias`: token id → a number between −100 and 100, at most 1024 entries."""
    value = body.get("logit_bias")
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 1024:
        raise RequestError("'logit_bias' must be an object of at most 1024 token ids", param="logit_bias")
    read: dict[str, float] = {}
    for key, bias in value.items():
        if type(bias) is int and bias == 0:
            continue  # it changes nothing, whatever it is of
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError(f"'logit_bias' has the key {show(key)}, which is no token id", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise RequestError(
                f"'logit_bias' of token {key} must be a number between -100 and 100, not {show(bias)}",
                param="logit_bias",
            )
        read[str(int(key))] = float(bias)
    return read


def refuse_unknown(body: Body, known: Collection[str]) -> None:
    """Raises for the first field that is none of `known`, as OpenAI does."""
    for name in body:
        if name not in known:
            raise RequestError(f"Unrecognized request argument supplied: {show(name, quoted=False)}", param=name[:100])


def show(value: Any, *, quoted: bool = True) -> str:
    """A value as a message may name it: short, on one line."""
    text = repr(value) if quoted else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
