"""Tools, choices and calls are read in OpenAI's forms, today's and older, or refused with the field named."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.chat.calls import CallDelta
from gateway.chat.conversation import Message, ToolCall
from gateway.errors import RequestError
from gateway.wire import chat

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
FUNCTION: dict[str, Any] = {"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "g"}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def named(name: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": TOOLS * 70}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": ["f"]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [named("a b")]}, "tools[0].function.name"),
        ({"tools": [named("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [named(None)]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {**FUNCTION, "parameters": []}}]}, "tools[0].function.parameters"),
        (
            {"tools": [{"type": "function", "function": {**FUNCTION, "description": 3}}]},
            "tools[0].function.description",
        ),
        ({"tools": [{"type": "function", "function": {**FUNCTION, "strict": 1}}]}, "tools[0].function.strict"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("h")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [FUNCTION], "tools": TOOLS}, "tools"),
        ({"functions": "f"}, "functions"),
        ({"functions": [{"name": ""}]}, "functions[0].name"),
        ({"functions": [FUNCTION], "function_call": {"name": "h"}}, "function_call"),
        ({"functions": [FUNCTION], "function_call": "required"}, "function_call"),
    ],
)
def test_tools_that_break_a_rule_are_refused_with_their_param(fields: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat.parse({**HELLO, **fields})
    assert refused.value.param == param
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    ("fields", "forced", "single", "reason"),
    [
        ({}, (), False, "tool_calls"),
        ({"tool_choice": "auto"}, (), False, "tool_calls"),
        ({"tool_choice": "required"}, ("f", "g"), False, "tool_calls"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ("f", "g"), True, "tool_calls"),
        ({"tool_choice": named("g")}, ("g",), True, "stop"),
        ({"parallel_tool_calls": False}, (), True, "tool_calls"),
        ({"parallel_tool_calls": True}, (), False, "tool_calls"),
    ],
)
def test_a_choice_says_what_the_reply_must_begin_with(
    fields: dict[str, object], forced: tuple[str, ...], single: bool, reason: str
) -> None:
    tools = chat.parse({**HELLO, "tools": TOOLS, **fields}).tools
    assert (tools.use.forced, tools.use.single, tools.finish_reason) == (forced, single, reason)
    assert [tool["function"]["name"] for tool in tools.use.tools] == ["f", "g"]


def test_the_choice_none_leaves_the_tools_out() -> None:
    assert chat.parse({**HELLO, "tools": TOOLS, "tool_choice": "none"}).tools.use.tools == ()
    assert chat.parse({**HELLO, "functions": [FUNCTION], "function_call": "none"}).tools.use.tools == ()


def test_functions_are_tools_that_reply_in_the_older_form() -> None:
    tools = chat.parse({**HELLO, "functions": [FUNCTION], "function_call": {"name": "f"}}).tools
    assert tools.use.tools == ({"type": "function", "function": FUNCTION},)
    assert (tools.use.forced, tools.use.single, tools.older) == (("f",), True, True)
    assert chat.parse({**HELLO, "functions": [FUNCTION]}).tools.finish_reason == "function_call"


def test_calls_results_and_reasoning_are_read_from_messages() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
        {"role": "assistant", "content": "done", "reasoning": "so", "tool_calls": None},
    ]
    assert chat.parse({"model": "m", "messages": messages}).messages == [
        Message("user", "hi"),
        Message("assistant", "", tool_calls=(ToolCall("call_1", "f", "{}"),), reasoning="hm"),
        Message("tool", "42", tool_call_id="call_1"),
        Message("assistant", "done", reasoning="so"),
    ]


def test_older_calls_and_their_results_get_ids_that_belong_together() -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{"}},
        {"role": "function", "name": "f", "content": "42"},
    ]
    _, call, result = chat.parse({"model": "m", "messages": messages}).messages
    assert call.tool_calls == (ToolCall(call.tool_calls[0].id, "f", "{"),)
    assert result == Message("tool", "42", tool_call_id=call.tool_calls[0].id, name="f")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "tool", "content": None, "tool_call_id": "c"}, "content"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "assistant", "tool_calls": "f"}, "tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}, "tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": ""}}]}, "tool_calls[0].function.name"),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
            "tool_calls[0].function.arguments",
        ),
        ({"role": "assistant", "content": "x", "reasoning": 5}, "reasoning"),
    ],
)
def test_messages_that_break_a_rule_are_refused_with_their_param(message: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        chat.parse({"model": "m", "messages": [message]})
    assert refused.value.param == f"messages[0].{param}"


def test_options_for_the_template_are_read() -> None:
    request = chat.parse({**HELLO, "reasoning_effort": "none", "chat_template_kwargs": {"keep": 1}})
    assert request.options == {"reasoning_effort": "none", "enable_thinking": False, "keep": 1}


def test_a_whole_completion_with_calls_is_what_the_sdk_reads() -> None:
    call = CallDelta(0, "call_1", "f", ['{"a":', " 1}"])
    written = chat.completion("c", 5, "m", [chat.Choice("", "tool_calls", None, "hm", [call])], chat.Usage(3, 2, 1, 1))
    (choice,) = ChatCompletion.model_validate(written).choices
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].model_dump() == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"a": 1}'},
    }
    assert (choice.message.model_extra or {})["reasoning_content"] == "hm"
    older = chat.completion(
        "c", 5, "m", [chat.Choice("", "function_call", None, "", [call])], chat.Usage(1, 1), older=True
    )
    message = ChatCompletion.model_validate(older).choices[0].message
    assert message.tool_calls is None
    assert message.function_call is not None
    assert message.function_call.arguments == '{"a": 1}'


def test_frames_of_calls_and_reasoning_are_what_the_sdk_reads() -> None:
    write = chat.ChunkWriter("c", 5, "m", include_usage=False)
    frames = [
        write.role(1, content=b"null"),
        write.reasoning(1, "hm"),
        write.call(1, CallDelta(0, "call_1", "f", ['{"a"'])),
        write.call(1, CallDelta(0, None, None, [": 1}"])),
        write.function_call(1, CallDelta(0, "call_1", "f", ["{}"])),
    ]
    deltas = [ChatCompletionChunk.model_validate_json(frame[6:]).choices[0].delta for frame in frames]
    assert deltas[0].content is None
    assert (deltas[1].model_extra or {}) == {"reasoning_content": "hm", "reasoning": "hm"}
    first, more = ((delta.tool_calls or [])[0] for delta in deltas[2:4])
    assert (first.index, first.id, first.type) == (0, "call_1", "function")
    assert first.function is not None
    assert (first.function.name, first.function.arguments) == ("f", '{"a"')
    assert more.model_dump(exclude_unset=True) == {"index": 0, "function": {"arguments": ": 1}"}}
    assert deltas[4].function_call is not None
    assert deltas[4].function_call.name == "f"
