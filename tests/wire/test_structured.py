"""`response_format` as OpenAI takes and refuses it; what is let through, the llama worker can hold a reply to."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib._pydantic import to_strict_json_schema
from pydantic import BaseModel, Field

from gateway.errors import RequestError
from gateway.llama_worker.structured.compiler import KINDS as WORKER_KINDS
from gateway.llama_worker.structured.compiler import read_wish
from gateway.llama_worker.structured.json_rules import FORMATS as WORKER_FORMATS
from gateway.llama_worker.structured.json_schema import schema_to_gbnf
from gateway.llama_worker.structured.rules import parse
from gateway.wire import chat, completions
from gateway.wire.structured import FORMATS, KINDS, Structured, parse_structured

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


class Line(BaseModel):
    item: str = Field(description="what it is", min_length=1, max_length=80)
    count: int = Field(ge=1, le=99)
    price: float | None
    tags: list[Literal["new", "sale"]] = Field(max_length=3)


class Order(BaseModel):
    """An order with everything that the SDK makes a strict schema of."""

    lines: list[Line]
    previous: Order | None
    placed_at: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")


def json_schema(schema: Any, strict: bool | None = True, name: str = "reply") -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": strict}}
    }


def strict_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def test_text_is_no_form_and_an_object_is_one() -> None:
    assert parse_structured({}) is None
    assert parse_structured({"response_format": {"type": "text"}}) is None
    assert parse_structured({"response_format": {"type": "json_object"}}) == Structured(
        "json_object", True, "response_format"
    )
    assert parse_structured(json_schema(None, strict=None)) == Structured("json_object", True, "response_format")


def test_what_the_sdk_makes_of_a_model_class_is_taken_whole() -> None:
    asked = parse_structured(json_schema(to_strict_json_schema(Order)))
    assert asked is not None
    assert asked.kind == "json"
    assert asked.value["properties"].keys() == {"lines", "previous", "placed_at"}
    assert len(parse(schema_to_gbnf(asked.value)).masks) > 100


@pytest.mark.parametrize(
    ("schema", "context", "word"),
    [
        (strict_object(a={"type": "integer", "multipleOf": 2}), ("properties", "a"), "multipleOf"),
        (strict_object(a={"oneOf": [{"type": "string"}]}), ("properties", "a"), "oneOf"),
        (strict_object(a={"allOf": [{"type": "string"}]}), ("properties", "a"), "allOf"),
        (strict_object(a={"not": {}}), ("properties", "a"), "not"),
        (strict_object(a={"type": "string", "format": "color"}), ("properties", "a"), "format"),
        (strict_object(a={"type": "number", "minimum": 0.5}), ("properties", "a"), "minimum"),
        (strict_object(a={"type": "array", "items": {"if": {}}}), ("properties", "a", "items"), "if"),
        (strict_object(a={"anyOf": [{"type": "null"}, {"dependentRequired": {}}]}), ("properties", "a", "anyOf", "1"), "dep"),
        ({**strict_object(a={"type": "string"}), "$defs": {"d": {"uniqueItems": True}}}, ("$defs", "d"), "uniqueItems"),
        ({**strict_object(a={}), "required": []}, (), "Missing 'a'"),
        ({"type": "object", "properties": {}}, (), "additionalProperties"),
        (strict_object(a={"type": "object", "properties": {}}), ("properties", "a"), "additionalProperties"),
        ({"type": "array", "items": {}}, (), "object"),
        (strict_object(a=True), ("properties", "a"), "object"),
        (strict_object(**{f"p{n}": {"type": "null"} for n in range(5001)}), (), "5000"),
    ],
)  # fmt: skip
def test_what_strict_mode_cannot_hold_to_is_refused_by_its_path(
    schema: Any, context: tuple[str, ...], word: str
) -> None:
    with pytest.raises(RequestError) as refused:
        parse_structured(json_schema(schema))
    assert (refused.value.status, refused.value.param) == (400, "response_format")
    assert refused.value.message.startswith(f"Invalid schema for response_format 'reply': In context={context!r}, ")
    assert word in refused.value.message


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = strict_object(a=schema)
    return schema


@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_nested_too_deep_is_refused_soon(strict: bool) -> None:
    assert parse_structured(json_schema(nested(9), strict=strict)) is not None
    with pytest.raises(RequestError) as refused:
        parse_structured(json_schema(nested(300), strict=strict))
    assert "nested deeper" in refused.value.message
    assert len(refused.value.message) <= 1000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (json_schema({}, name="a b"), "response_format.json_schema.name"),
        (json_schema({}, name=""), "response_format.json_schema.name"),
        (json_schema({}, name="x" * 65), "response_format.json_schema.name"),
        (json_schema({}, strict="yes"), "response_format.json_schema.strict"),  # type: ignore[arg-type]
        (json_schema("{}"), "response_format"),
        (json_schema(None), "response_format"),
        ({"structured_outputs": "a"}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json_object": True}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format"),
    ],
)  # fmt: skip
def test_a_wrong_form_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat.parse({**HELLO, **body})
    assert refused.value.param == param


def test_tools_that_may_not_be_called_stand_in_no_ones_way() -> None:
    body = {"response_format": {"type": "json_object"}, "tools": [TOOL], "tool_choice": "none"}
    assert chat.parse({**HELLO, **body}).sampling.structured is not None


def test_vllms_own_field_is_taken_by_both_kinds_of_completion() -> None:
    wish = {"structured_outputs": {"choice": ["a", "b"], "regex": None}}
    asked = Structured("choice", ["a", "b"], "structured_outputs")
    assert chat.parse({**HELLO, **wish}).sampling.structured == asked
    assert completions.parse({"model": "m", "prompt": "x", **wish}).sampling.structured == asked


def test_gateway_and_worker_mean_the_same_by_their_lists() -> None:
    assert set(KINDS) == set(WORKER_KINDS)
    assert set(WORKER_FORMATS) == FORMATS


@pytest.mark.parametrize(
    ("schema", "left"),
    [
        ({"type": "integer", "multipleOf": 2}, {"type": "integer"}),
        ({"type": "string", "format": "color", "title": "t"}, {"type": "string"}),
        ({"type": "number", "minimum": 0.5, "maximum": 3}, {"type": "number", "maximum": 3}),
        ({"oneOf": [{"not": {}}, {"type": "null"}]}, {"oneOf": [{}, {"type": "null"}]}),
        ({"allOf": [{"type": "null"}, {}]}, {}),
        ({"type": "object", "properties": {"a": True}, "anyOf": [{}]}, {"type": "object", "properties": {"a": {}}}),
        ({"enum": ["a"], "type": "string", "minLength": 1}, {"enum": ["a"], "type": "string"}),
        ({"$ref": "#/$defs/a", "type": "object", "$defs": {"a": {}}}, {"$ref": "#/$defs/a", "$defs": {"a": {}}}),
    ],
)
def test_what_is_not_strict_is_held_to_as_far_as_that_goes(schema: Any, left: Any) -> None:
    asked = parse_structured(json_schema(schema, strict=False))
    assert asked is not None
    assert asked.value in ({**left, "type": "object"}, left)
    parse(schema_to_gbnf(asked.value))


names = st.sampled_from(["a", "b", 'c"d', "é", ""])
scalars = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["string", "integer", "number", "boolean", "null", ["string", "null"]]),
        "enum": st.lists(st.none() | st.integers(-(2**63), 2**63) | st.text(max_size=3), min_size=1, max_size=3),
        "minLength": st.integers(0, 5),
        "maxLength": st.integers(5, 9),
        "minimum": st.integers(-5, 5) | st.floats(-2, 2),
        "maximum": st.integers(5, 500),
        "multipleOf": st.integers(1, 3),
        "pattern": st.sampled_from(["^a+$", "x", "[0-9]{2}"]),
        "format": st.sampled_from([*sorted(FORMATS), "color"]),
        "description": st.text(max_size=3),
        "not": st.just({}),
    },
)
schemas = st.recursive(
    scalars,
    lambda inner: (
        st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=3)},
            optional={"additionalProperties": st.booleans() | inner, "anyOf": st.lists(inner, max_size=2)},
        )
        | st.fixed_dictionaries({"type": st.just("array")}, optional={"items": inner, "maxItems": st.integers(0, 3)})
        | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=3)})
    ),
    max_leaves=6,
)


@given(schema=schemas)
def test_every_loose_schema_that_is_let_through_can_be_held_to(schema: Any) -> None:
    asked = parse_structured(json_schema(schema, strict=False))
    assert asked is not None
    wish = read_wish({asked.kind: asked.value})
    assert wish is not None
    try:
        grammar = schema_to_gbnf(asked.value)
    except RequestError as error:
        # What no document can be is nobody's to hold to.
        assert any(word in error.message for word in ("no number", "no value of the 'type'")), error.message
    else:
        parse(grammar)
