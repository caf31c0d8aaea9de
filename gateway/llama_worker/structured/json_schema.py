"""A JSON schema as GBNF: every text of the grammar is a document that the schema accepts. Pure.

Its rule: a keyword is held to or refused by its path, never passed over. Where a schema leaves room the grammar may take less
of it: properties come in the schema's order, an object has none but those it lists unless `additionalProperties` asks for more,
and white space is at most what a pretty-printer writes. `oneOf` alone is taken for less than it says: for `anyOf`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gateway.errors import RequestError
from gateway.llama_worker.structured import numbers
from gateway.llama_worker.structured.gbnf import MAX_REPETITIONS, PARAM
from gateway.llama_worker.structured.json_rules import COMMON, FORMATS
from gateway.llama_worker.structured.regex import UnsupportedRegex, regex_to_gbnf
from gateway.llama_worker.structured.spelling import JSON_FORBIDDEN, char_class, complement, quote, subtract

MAX_NODES = 20_000
MAX_DEPTH = 64
MAX_CHARACTERS = 200_000
MAX_OTHER_KEY = 200

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANNOTATIONS = frozenset(
    "title description default examples example $schema $id $comment $anchor deprecated readOnly writeOnly $defs "
    "definitions discriminator contentMediaType contentEncoding".split()
)
_BY_TYPE = {
    "object": frozenset("properties required additionalProperties".split()),
    "array": frozenset("items prefixItems minItems maxItems".split()),
    "string": frozenset("minLength maxLength pattern format".split()),
    "number": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum".split()),
}
_BY_TYPE |= {"integer": _BY_TYPE["number"], "boolean": frozenset(), "null": frozenset()}
_ASSERTIONS = frozenset("type enum const anyOf oneOf allOf $ref".split()).union(*_BY_TYPE.values())

_KEY_CHARACTERS = complement(JSON_FORBIDDEN)

Path = tuple[str, ...]


class UnsupportedSchema(RequestError):
    """A schema that is wrong or cannot be held to; the message says where."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"Invalid schema: In context={path!r}, {message}.", param=PARAM)


def schema_to_gbnf(schema: Any) -> str:
    """The grammar of the documents of `schema`. Raises UnsupportedSchema, which names the keyword's path."""
    return _Converter(schema).grammar()


class _Converter:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}  # text → name: what is the same is written once
        self._references: dict[str, str] = {}
        self._written: list[str] = []
        self._nodes = 0
        self._depth = 0
        self._characters = 0

    def grammar(self) -> str:
        root = self._visit(self._schema, ())
        return "\n".join([f'root ::= " "? {root}', *self._written, COMMON])

    def _visit(self, schema: Any, path: Path) -> str:
        """An expression, short or the name of a rule, for one schema."""
        self._enter(path)
        try:
            return self._visit_schema(schema, path)
        finally:
            self._depth -= 1

    def _enter(self, path: Path) -> None:
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES:
            raise UnsupportedSchema(path, f"the schema has more than {MAX_NODES} parts, which is the limit")
        if self._depth > MAX_DEPTH:
            raise UnsupportedSchema((*path[:6], "…"), f"it is nested deeper than {MAX_DEPTH}, which is the limit")

    def _visit_schema(self, schema: Any, path: Path) -> str:
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise UnsupportedSchema(path, f"schema must be an object, not {_show(schema)}")
        for keyword, value in schema.items():
            harmless = keyword in _ANNOTATIONS or (keyword == "uniqueItems" and value is False)
            if keyword not in _ASSERTIONS and not harmless:
                raise UnsupportedSchema(path, f"{_show(keyword)} is not supported")
        for keyword, visit in self._combinators():
            if keyword in schema:
                others = _ASSERTIONS & schema.keys() - {keyword, "type"}
                if others:
                    raise UnsupportedSchema(path, f"{min(others)!r} beside {keyword!r} is not supported")
                return visit(schema, path)
        types = self._types(schema, path)
        return self._union([self._visit_type(kind, schema, path) for kind in types])

    def _combinators(self) -> list[tuple[str, Callable[[dict[str, Any], Path], str]]]:
        return [
            ("$ref", self._reference),
            ("const", lambda schema, path: self._choices("const", [schema["const"]], schema, path)),
            ("enum", lambda schema, path: self._choices("enum", schema["enum"], schema, path)),
            ("anyOf", lambda schema, path: self._any_of("anyOf", schema, path)),
            ("oneOf", lambda schema, path: self._any_of("oneOf", schema, path)),
            ("allOf", self._all_of),
        ]

    def _reference(self, schema: dict[str, Any], path: Path) -> str:
        pointer = schema["$ref"]
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise UnsupportedSchema(
                path, f"'$ref' is {_show(pointer)}; only references into the schema itself (#/…) are supported"
            )
        if pointer not in self._references:
            name = self._references[pointer] = f"ref{len(self._references)}"
            target: Any = self._schema
            for part in pointer.split("/")[1:]:
                part = part.replace("~1", "/").replace("~0", "~")
                target = target.get(part) if isinstance(target, dict) else None
                if target is None:
                    raise UnsupportedSchema(path, f"'$ref' is {_show(pointer)}, and the schema has nothing there")
            text = self._visit(target, (pointer,))
            self._written.append(f"{name} ::= {text}")
        return self._references[pointer]

    def _choices(self, keyword: str, values: Any, schema: dict[str, Any], path: Path) -> str:
        if not isinstance(values, list) or not values:
            raise UnsupportedSchema(path, f"{keyword!r} must be a list that is not empty")
        types = self._types(schema, path) if "type" in schema else _TYPES
        spelled = [self._constant(value, path) for value in values if any(_is_a(value, kind) for kind in types)]
        if not spelled:
            raise UnsupportedSchema(path, f"{keyword!r} has no value of the 'type'")
        return self._union(spelled)

    def _constant(self, value: Any, path: Path) -> str:
        self._enter(path)
        try:
            return self._spell(value, path)
        finally:
            self._depth -= 1

    def _spell(self, value: Any, path: Path) -> str:
        if isinstance(value, dict):
            pairs = [f'{self._text(key)} ":" ws {self._constant(item, path)}' for key, item in value.items()]
            return self._rule(_enclosed("{", ' "," ws '.join(pairs), "}"))
        if isinstance(value, list):
            return self._rule(_enclosed("[", ' "," ws '.join(self._constant(item, path) for item in value), "]"))
        if isinstance(value, str):
            return self._text(value)
        return quote(json.dumps(value))

    def _text(self, text: str) -> str:
        self._count(text)
        return quote(json.dumps(text, ensure_ascii=False))

    def _any_of(self, keyword: str, schema: dict[str, Any], path: Path) -> str:
        options = schema[keyword]
        if not isinstance(options, list) or not options:
            raise UnsupportedSchema(path, f"{keyword!r} must be a list that is not empty")
        if "type" in schema:  # it holds for each of them
            kind = {"type": schema["type"]}
            options = [{**kind, **option} if _lacks_type(option) else option for option in options]
        return self._union([self._visit(option, (*path, keyword, str(n))) for n, option in enumerate(options)])

    def _all_of(self, schema: dict[str, Any], path: Path) -> str:
        options = schema["allOf"]
        if not isinstance(options, list) or len(options) != 1:
            raise UnsupportedSchema(path, "'allOf' is not supported, but for a list of one")
        return self._visit(options[0], (*path, "allOf", "0"))

    def _types(self, schema: dict[str, Any], path: Path) -> tuple[str, ...]:
        given = schema.get("type")
        if given is None:  # what it says is about one type: documents of that type are among those it accepts
            return (
                tuple(kind for kind in ("object", "array", "string", "number") if _BY_TYPE[kind] & schema.keys())[:1]
                or _TYPES
            )
        listed = given if isinstance(given, list) else [given]
        for kind in listed:
            if kind not in _TYPES:
                raise UnsupportedSchema(path, f"'type' is {_show(kind)}; it must be one of {', '.join(_TYPES)}")
        if not listed:
            raise UnsupportedSchema(path, "'type' is an empty list")
        return tuple(dict.fromkeys(listed))

    def _visit_type(self, kind: str, schema: dict[str, Any], path: Path) -> str:
        if not _BY_TYPE[kind] & schema.keys():
            return kind
        if kind == "object":
            return self._object(schema, path)
        if kind == "array":
            return self._array(schema, path)
        if kind == "string":
            return self._string(schema, path)
        return self._rule(numbers.between(schema, kind == "integer", lambda message: UnsupportedSchema(path, message)))

    def _object(self, schema: dict[str, Any], path: Path) -> str:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        if not isinstance(properties, dict):
            raise UnsupportedSchema(path, "'properties' must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise UnsupportedSchema(path, "'required' must be a list of names")
        more = schema.get("additionalProperties", not properties)
        for name in required:
            if name not in properties:
                if more is False or "additionalProperties" not in schema:
                    raise UnsupportedSchema(
                        path, f"'required' holds {_show(name)}, which is not among the 'properties'"
                    )
                properties = {**properties, name: more}
        # From the last to the first: what may come from here on, when no property was written before and when one was.
        first, later = '""', '""'
        if more is not False:
            key = self._other_key(list(properties), path)
            pair = self._rule(f'{key} ":" ws {self._visit(more, (*path, "additionalProperties"))}')
            first, later = f'({pair} ("," ws {pair})*)?', f'("," ws {pair})*'
        for name, value in reversed(properties.items()):
            without_first, without_later = self._rule(first), self._rule(later)
            pair = self._rule(f'{self._text(name)} ":" ws {self._visit(value, (*path, "properties", name))}')
            first, later = f"{pair} {without_later}", f'"," ws {pair} {without_later}'
            if name not in required:
                first, later = f"{first} | {without_first}", f"{later} | {without_later}"
        return self._rule(f'"{{" ws {self._rule(first)} ws "}}"')

    def _other_key(self, names: list[str], path: Path) -> str:
        """A property's name that is none of `names`."""
        if any(len(name) > MAX_OTHER_KEY for name in names):
            raise UnsupportedSchema(
                path,
                f"'additionalProperties' beside a property's name of more than {MAX_OTHER_KEY} characters is not supported",
            )
        return f'"\\"" {self._other_than(names, 0)} "\\""' if names else "string"

    def _other_than(self, names: list[str], at: int) -> str:
        by_char: dict[str, list[str]] = {}
        for name in names:
            if len(name) > at:
                by_char.setdefault(name[at], []).append(name)
        taken = [(ord(char), ord(char)) for char in by_char]
        options = [f"{char_class(subtract(_KEY_CHARACTERS, taken))} key-char*"]
        options += [f"{quote(char)} {self._other_than(inner, at + 1)}" for char, inner in by_char.items()]
        ends = not any(len(name) == at for name in names)
        return self._rule(f"({' | '.join(options)})" + ("?" if ends else ""))

    def _array(self, schema: dict[str, Any], path: Path) -> str:
        least = self._size(schema, "minItems", path) or 0
        most = self._size(schema, "maxItems", path)
        given = schema.get("prefixItems", [])
        if not isinstance(given, list):
            raise UnsupportedSchema(path, "'prefixItems' must be a list")
        if most is not None and most < least:
            raise UnsupportedSchema(path, f"'maxItems' {most} is below 'minItems' {least}")
        fixed = [self._visit(item, (*path, "prefixItems", str(n))) for n, item in enumerate(given[:most])]
        least = max(0, least - len(fixed))
        most = None if most is None else most - len(fixed)
        items = schema.get("items", True)
        if items is False and least:
            raise UnsupportedSchema(path, "'items' is false, and 'minItems' asks for more than 'prefixItems' has")
        if items is False or most == 0:
            return self._rule(_enclosed("[", ' "," ws '.join(fixed), "]"))
        item = self._rule(self._visit(items, (*path, "items")))
        upper = "" if most is None else most
        if fixed:
            return self._rule(_enclosed("[", ' "," ws '.join(fixed) + f' ("," ws {item}){{{least},{upper}}}', "]"))
        upper = "" if most is None else most - 1
        listed = f'{item} ("," ws {item}){{{max(0, least - 1)},{upper}}} ws'
        return self._rule('"[" ws ' + (listed if least else f"({listed})?") + ' "]"')

    def _string(self, schema: dict[str, Any], path: Path) -> str:
        told = sorted(_BY_TYPE["string"] & schema.keys())
        if "pattern" in told or "format" in told:
            if len(told) > 1:
                raise UnsupportedSchema(path, f"{told[0]!r} beside {told[1]!r} is not supported")
            return self._rule(self._pattern(schema, told[0], path))
        least, most = self._size(schema, "minLength", path) or 0, self._size(schema, "maxLength", path)
        if most is not None and most < least:
            raise UnsupportedSchema(path, f"'maxLength' {most} is below 'minLength' {least}")
        return self._rule(f'"\\"" char{{{least},{"" if most is None else most}}} "\\""')

    def _pattern(self, schema: dict[str, Any], keyword: str, path: Path) -> str:
        given = schema[keyword]
        if not isinstance(given, str) or (keyword == "format" and given not in FORMATS):
            known = f"a known format ({', '.join(FORMATS)})" if keyword == "format" else "a regular expression"
            raise UnsupportedSchema(path, f"{keyword!r} is {_show(given)}; it must be {known}")
        self._count(given)
        pattern = FORMATS[given] if keyword == "format" else given
        try:
            inside = regex_to_gbnf(pattern, in_json_string=True, whole=keyword == "format")
        except UnsupportedRegex as error:
            raise UnsupportedSchema((*path, keyword), str(error)) from None
        return f'"\\"" ({inside}) "\\""'

    def _size(self, schema: dict[str, Any], keyword: str, path: Path) -> int | None:
        value = schema.get(keyword)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value <= MAX_REPETITIONS:
            raise UnsupportedSchema(
                path, f"{keyword!r} is {_show(value)}; it must be an integer from 0 to {MAX_REPETITIONS}"
            )
        return value

    def _union(self, options: list[str]) -> str:
        options = list(dict.fromkeys(options))
        return options[0] if len(options) == 1 else self._rule(" | ".join(options))

    def _rule(self, text: str) -> str:
        """A name for `text`."""
        name = self._rules.get(text)
        if name is None:
            self._count(text)
            name = self._rules[text] = f"r{len(self._rules)}"
            self._written.append(f"{name} ::= {text}")
        return name

    def _count(self, text: str) -> None:
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            raise UnsupportedSchema(
                (), f"the schema is too large: its grammar has more than {MAX_CHARACTERS} characters"
            )


def _enclosed(opening: str, inside: str, closing: str) -> str:
    return f'"{opening}" ws {inside} ws "{closing}"' if inside else f'"{opening}" ws "{closing}"'


def _lacks_type(option: Any) -> bool:
    return isinstance(option, dict) and not {"type", "$ref", "const", "enum", "anyOf", "oneOf", "allOf"} & option.keys()


def _is_a(value: Any, kind: str) -> bool:
    if kind == "number":
        return type(value) in (int, float)
    if kind == "integer":
        return type(value) is int or (type(value) is float and value.is_integer())
    return type(value) is {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}[kind]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
