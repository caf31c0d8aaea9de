"""`{{ item.question }}` and `{{ sample.output_text }}`, filled in: how graders and evals speak of data. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_CHARS = 1_000_000  # of texts that are filled in together: a short one may name a long value many times

_HOLE = re.compile(r"\{\{\s*([^{}]{1,500}?)\s*\}\}")
_PATH = re.compile(r"([A-Za-z_]\w*)((?:\.\w+|\[\d{1,9}\]|\['[^']*'\]|\[\"[^\"]*\"\])*)")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]")


class FillError(ValueError):
    """A text that cannot be filled in; says why."""


class UnknownVariable(FillError):
    """A placeholder that nothing stands for; names it."""


def fill(text: str, variables: Mapping[str, Any]) -> str:
    """The text with every placeholder's value in its place; what is no text stands as JSON. Raises FillError."""
    return fill_all([text], variables)[0]


def fill_all(texts: Iterable[str], variables: Mapping[str, Any]) -> list[str]:
    """Each of the texts, filled in. Raises FillError, also where they come to more than MAX_CHARS together."""
    left = MAX_CHARS
    filled = []
    for text in texts:
        parts: list[str] = []
        at = 0
        for hole in _HOLE.finditer(text):
            parts += (text[at : hole.start()], _shown(look_up(hole[1], variables)))
            at = hole.end()
            left -= len(parts[-2]) + len(parts[-1])
            if left < 0:
                break
        parts.append(text[at:])
        left -= len(parts[-1])
        if left < 0:
            raise FillError(f"its texts come to more than {MAX_CHARS} characters with their placeholders filled in")
        filled.append("".join(parts))
    return filled


def look_up(path: str, variables: Mapping[str, Any]) -> Any:
    """What `item.answers[0].text` stands for. Raises UnknownVariable."""
    read = _PATH.fullmatch(path)
    if read is None or read[1] not in variables:
        raise UnknownVariable(f"'{path}' names no variable; there are {', '.join(variables)}")
    value = variables[read[1]]
    for step in _STEP.finditer(read[2]):
        key: Any = next(part for part in step.groups() if part is not None)
        if isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            raise UnknownVariable(f"'{path}' stands for nothing: there is no {key!r}")
    return value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
