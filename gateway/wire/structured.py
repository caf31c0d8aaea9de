"""What a reply must look like: `response_format`, and vLLM's `structured_outputs` beside it. Pure.

Its rule: what OpenAI's strict mode asks of a schema is asked here, keyword by keyword, and what the engines cannot hold a
reply to is refused by its path. A schema that is not strict promises nothing, so there what cannot be held to is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body, show

KINDS = ("json", "json_object", "regex", "choice", "grammar")
FORMATS = frozenset("date time date-time duration email hostname ipv4 ipv6 uuid".split())

_ANNOTATIONS = frozenset(
    "title description default examples example $schema $id $comment $anchor deprecated readOnly writeOnly discriminator "
    "contentMediaType contentEncoding".split()
)
_COMBINATORS = ("anyOf", "oneOf", "allOf")  # strict mode has the first alone
_BOUNDS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum".split())
_HELD = frozenset(
    "type enum const anyOf $ref $defs definitions properties required additionalProperties items prefixItems minItems "
    "maxItems minLength maxLength pattern format".split()
).union(_BOUNDS)
# OpenAI's limits of a strict schema.
_MAX_DEPTH, _MAX_PROPERTIES = 10, 5000
_MAX_PARTS = 20_000
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Structured:
    """What the engine is asked to hold the reply to: one of KINDS; `param` is the client's own name for it."""

    kind: str
    value: Any
    param: str


def parse_structured(body: Body) -> Structured | None:
    """From `response_format` or `structured_outputs`. Raises RequestError that names the field and, in a schema, the path."""
    asked = _response_format(body.get("response_format"))
    extended = _extension(body.get("structured_outputs"))
    if asked is not None and extended is not None:
        raise RequestError(
            "'structured_outputs' is not taken beside 'response_format'; send one of them", param="structured_outputs"
        )
    return asked or extended


def parse_text_format(raw: Any) -> Structured | None:
    """`text.format` of a response, whose name, schema and strict lie flat. Raises as `parse_structured` does."""
    return _format(raw, "text.format", "text.format", raw)


def _response_format(raw: Any) -> Structured | None:
    described = raw.get("json_schema") if isinstance(raw, dict) else None
    return _format(raw, "response_format", "response_format.json_schema", described)


def _format(raw: Any, param: str, where: str, described: Any) -> Structured | None:
    """`where` is the client's path of what describes the schema."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if raw is None or kind == "text":
        return None
    if kind == "json_object":
        return Structured("json_object", True, param)
    if kind != "json_schema":
        raise RequestError(
            f"'{param}' must be an object whose type is text, json_object or json_schema, not {show(raw)}", param=param
        )
    if not isinstance(described, dict):
        raise RequestError(f"'{where}' must be an object with name and schema, not {show(described)}", param=where)
    name = described.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"'{where}.name' must be 1 to 64 letters, digits, underscores or dashes, not {show(name)}",
            param=f"{where}.name",
        )
    schema = described.get("schema")
    strict = fields.boolean({f"{where}.strict": described.get("strict")}, f"{where}.strict")
    if schema is None and not strict:
        return Structured("json_object", True, param)
    checker = _Checker(f"{param} '{name}'", param, bool(strict))
    return Structured("json", checker.checked(schema), param)


def strict_parameters(function: Mapping[str, Any], where: str) -> Structured | None:
    """What a call of a function is held to: its parameters where it is `strict`. `where` is the function's own name."""
    if not function.get("strict"):
        return None
    param = f"{where}.parameters"
    schema = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    checked = _Checker(f"function '{function['name']}'", param, True).checked(schema)
    return Structured("json", checked, param)


def _extension(raw: Any) -> Structured | None:
    if raw is None:
        return None
    asked = (
        {name: told for name, told in raw.items() if told is not None and told is not False}
        if isinstance(raw, dict)
        else {}
    )
    if len(asked) != 1 or next(iter(asked)) not in KINDS:
        raise RequestError(
            f"'structured_outputs' must be an object with one of {', '.join(KINDS)}, not {show(raw)}",
            param="structured_outputs",
        )
    ((kind, value),) = asked.items()
    wanted = {"json": (dict, str), "json_object": (bool,), "choice": (list,)}.get(kind, (str,))
    if not isinstance(value, wanted):
        raise RequestError(f"'structured_outputs.{kind}' cannot be {show(value)}", param=f"structured_outputs.{kind}")
    return Structured(kind, value, "structured_outputs")


class _Checker:
    """Walks a schema once; `checked` gives it as it goes to the engine."""

    def __init__(self, name: str, param: str, strict: bool) -> None:
        self._name, self._param, self._strict = name, param, strict
        self._parts = self._properties = 0

    def checked(self, schema: Any) -> dict[str, Any]:
        if not isinstance(schema, dict):
            raise self._error((), f"schema must be a JSON schema of type object, not {show(schema)}")
        if self._strict and schema.get("type") != "object" and "$ref" not in schema:
            raise self._error((), f"schema must be of 'type' \"object\", not {show(schema.get('type'))}")
        return dict(self._schema(schema, (), 0))

    def _schema(self, schema: Any, path: tuple[str, ...], depth: int) -> Mapping[str, Any]:
        self._parts += 1
        if depth > _MAX_DEPTH * (1 if self._strict else 4):
            raise self._error(path[:6], f"it is nested deeper than {_MAX_DEPTH} levels")
        if self._parts > _MAX_PARTS:
            raise self._error((), f"it has more than {_MAX_PARTS} parts")
        if not isinstance(schema, dict):
            if schema is True and not self._strict:
                return {}
            raise self._error(path, f"schema must be an object, not {show(schema)}")
        kept = {keyword: value for keyword, value in schema.items() if self._keeps(keyword, schema, path)}
        if self._strict:
            self._check_object(schema, path)
        else:
            kept = _simplified(kept)
        for keyword in ("properties", "$defs", "definitions"):
            if isinstance(kept.get(keyword), dict):
                deeper = depth + (keyword == "properties")
                kept[keyword] = {
                    name: self._schema(inner, (*path, keyword, name), deeper) for name, inner in kept[keyword].items()
                }
        for keyword in ("items", "additionalProperties"):
            if isinstance(kept.get(keyword), dict):
                kept[keyword] = self._schema(kept[keyword], (*path, keyword), depth + 1)
        for keyword in (*_COMBINATORS, "prefixItems"):
            if isinstance(kept.get(keyword), list):
                kept[keyword] = [
                    self._schema(inner, (*path, keyword, str(n)), depth) for n, inner in enumerate(kept[keyword])
                ]
        return kept

    def _keeps(self, keyword: str, schema: dict[str, Any], path: tuple[str, ...]) -> bool:
        """Whether a keyword goes to the engine; raises where it would have to and cannot."""
        if keyword in _ANNOTATIONS:
            return False
        value = schema[keyword]
        if keyword == "format" and not _is_known(value):
            return self._drops(path, f"'format' is {show(value)}; it must be one of {', '.join(sorted(FORMATS))}")
        stronger = "pattern" if "pattern" in schema else "format" if _is_known(schema.get("format")) else None
        if stronger not in (None, keyword) and keyword in ("format", "minLength", "maxLength"):
            return self._drops(path, f"'{keyword}' beside '{stronger}' is not supported")
        if (
            keyword in _BOUNDS
            and {"number", None} & set(_types(schema))
            and isinstance(value, float)
            and not value.is_integer()
        ):
            return self._drops(path, f"'{keyword}' is {value}; bounds of a 'number' must be whole")
        if keyword not in _HELD and (self._strict or keyword not in _COMBINATORS):
            return self._drops(path, f"'{keyword[:100]}' is not permitted")
        return True

    def _drops(self, path: tuple[str, ...], why: str) -> bool:
        if self._strict:
            raise self._error(path, why)
        return False

    def _check_object(self, schema: dict[str, Any], path: tuple[str, ...]) -> None:
        if "object" not in _types(schema):
            return
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if schema.get("additionalProperties") is not False:
            raise self._error(path, "'additionalProperties' is required to be supplied and to be false")
        missing = [name for name in properties if name not in required] if isinstance(required, list) else properties
        for name in missing:
            raise self._error(
                path,
                "'required' is required to be supplied and to be an array including every key in properties. "
                f"Missing '{name[:100]}'",
            )
        self._properties += len(properties)
        if self._properties > _MAX_PROPERTIES:
            raise self._error((), f"it has more than {_MAX_PROPERTIES} properties")

    def _error(self, path: tuple[str, ...], why: str) -> RequestError:
        message = f"Invalid schema for {self._name}: In context={path!r}, {why}."
        return RequestError(message[:1000], param=self._param)


def _simplified(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what no engine holds to beside another keyword: the most telling one stays."""
    apart = {"type", "$defs", "definitions"}
    for keyword in ("$ref", "const", "enum"):
        if keyword in schema:
            return {name: value for name, value in schema.items() if name in apart | {keyword}}
    for keyword in _COMBINATORS:
        listed = schema.get(keyword)
        lonely = not schema.keys() - apart - {keyword}
        if keyword in schema and not (lonely and listed and (keyword != "allOf" or len(listed) == 1)):
            schema = {name: value for name, value in schema.items() if name != keyword}
    return schema


def _types(schema: dict[str, Any]) -> list[Any]:
    given = schema.get("type")
    return [kind for kind in (given if isinstance(given, list) else [given]) if kind is None or isinstance(kind, str)]


def _is_known(form: Any) -> bool:
    return isinstance(form, str) and form in FORMATS
