"""`{{ item.question }}` and `{{ sample.output_text }}`, filled in: how graders and evals speak of data. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_HOLE = re.compile(r"\{\{\s*([^{}]{1,500}?)\s*\}\}")
_PATH = re.compile(r"([A-Za-z_]\w*)((?:\.\w+|\[\d{1,9}\]|\['[^']*'\]|\[\"[^\"]*\"\])*)")
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]")


class UnknownVariable(ValueError):
    """A placeholder that nothing stands for; names it."""


def fill(text: str, variables: Mapping[str, Any]) -> str:
    """The text with every placeholder's value in its place; what is no text stands as JSON. Raises UnknownVariable."""
    return _HOLE.sub(lambda hole: _shown(look_up(hole[1], variables)), text)


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
