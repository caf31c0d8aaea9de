"""Responses on the wire: events against the SDK's own types and its accumulator, items to conversations and back."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.chat.calls import CallDelta
from gateway.chat.conversation import Message, ToolCall
from gateway.errors import RequestError
from gateway.wire.chat import Usage
from gateway.wire.response_events import Event, EventWriter, frame, replay
from gateway.wire.response_items import compaction, parse_input, read_compaction, to_messages
from gateway.wire.responses import parse, response_object

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
READ: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def told() -> tuple[list[Event], dict[str, Any]]:
    """Reasoning, a text and two calls, as they may come; and the response in the end."""
    request = parse({"model": "m", "input": "x", "tools": [TOOL]})
    write = EventWriter()
    events = write.told("created", response_object("resp_1", 5, request, status="in_progress"))
    events += write.feed("", "let me ")
    events += write.feed("Well", "see")
    events += write.feed(", so", calls=[CallDelta(0, "call_1", "weather", ['{"a"'])])
    events += write.feed("", calls=[CallDelta(0, None, None, [":1}"]), CallDelta(1, "call_2", "weather", ["{}"])])
    events += write.finish(whole=True)
    response = response_object(
        "resp_1", 5, request, status="completed", output=write.output, usage=Usage(3, 9, 1, 2), completed_at=6
    )
    return events + write.told("completed", response), response


def test_events_are_those_of_the_sdk_and_numbered_without_a_gap() -> None:
    events, _ = told()
    for event in events:
        read = READ.validate_python(event, strict=False)
        assert read.type == event["type"]
        assert frame(event).startswith(b"event: " + event["type"].encode() + b"\ndata: {")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


def test_the_deltas_of_each_item_add_up_to_the_item_in_the_response() -> None:
    events, response = told()
    parts: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            parts[event["item_id"]] = parts.get(event["item_id"], "") + event["delta"]
    reasoning, message, first, second = Response.model_validate(response).output
    assert (reasoning.type, message.type, first.type, second.type) == (
        "reasoning",
        "message",
        "function_call",
        "function_call",
    )
    assert parts[reasoning.id] == reasoning.content[0].text == "let me see"
    assert parts[message.id] == message.content[0].text == "Well, so"
    assert (parts[first.id], first.arguments, first.call_id) == ('{"a":1}', '{"a":1}', "call_1")
    assert (parts[second.id], second.arguments, second.call_id) == ("{}", "{}", "call_2")
    assert {item.status for item in (message, first, second)} == {"completed"}


def test_a_response_is_told_anew_under_its_own_ids() -> None:
    _, response = told()
    again = replay(response)
    assert [event["item"] for event in again if event["type"] == "response.output_item.done"] == response["output"]
    assert (again[0]["type"], again[-1]["type"]) == ("response.created", "response.completed")
    assert again[-1]["response"] == response
    for event in again:
        READ.validate_python(event)


def test_a_reply_that_was_cut_off_has_an_incomplete_item() -> None:
    write = EventWriter()
    write.feed("half a")
    write.finish(whole=False)
    assert write.output[0]["status"] == "incomplete"


def test_what_a_model_said_goes_back_as_one_turn() -> None:
    _, response = told()
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    items = parse_input([{"role": "user", "content": "hi"}, *response["output"], result])
    calls = (ToolCall("call_1", "weather", '{"a":1}'), ToolCall("call_2", "weather", "{}"))
    assert to_messages(items) == [
        Message("user", "hi"),
        Message("assistant", "Well, so", tool_calls=calls, reasoning="let me see"),
        Message("tool", "sunny", tool_call_id="call_1"),
    ]


def test_two_messages_of_the_model_stay_two() -> None:
    items = parse_input([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert [message.content for message in to_messages(items)] == ["a", "b"]


def test_parts_of_text_are_joined_and_roles_kept() -> None:
    content = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    items = parse_input([{"role": "developer", "content": content}])
    assert to_messages(items) == [Message("system", "ab")]


def test_a_compaction_is_read_back_and_a_foreign_one_refused() -> None:
    item = compaction("what was said, é😀")
    assert read_compaction(item) == "what was said, é😀"
    assert to_messages(parse_input([item])) == [Message("system", "what was said, é😀")]
    with pytest.raises(RequestError):
        parse_input([{"type": "compaction", "encrypted_content": "gAAAA"}])


def test_allowed_tools_leave_the_others_out() -> None:
    other = {**TOOL, "name": "clock"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    use = parse({"model": "m", "input": "x", "tools": [TOOL, other], "tool_choice": allowed}).tools.use
    assert [tool["function"]["name"] for tool in use.tools] == ["clock"]
    assert use.forced == ("clock",)
    named = {"type": "function", "name": "weather"}
    assert parse({"model": "m", "input": "x", "tools": [TOOL], "tool_choice": named}).tools.use.forced == ("weather",)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "x"}]}},
            "tool_choice.tools",
        ),
        ({"tools": [{**TOOL, "parameters": 5}]}, "tools[0].parameters"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"include": "all"}, "include"),
        ({"truncation": "some"}, "truncation"),
    ],
)
def test_what_breaks_a_rule_is_named_as_it_was_sent(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse({"model": "m", "input": "x", "tools": [TOOL], **fields})
    assert refused.value.param == param
