"""OpenAI's messages and tools, as they stand in a training file, → `Example`, or what is wrong with them and where.

Place in the flow: jsonl → forms → **conversations** → dataset. Pure. One rule: what cannot be trained on as it stands is
refused by the name of its field, never dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gateway.chat.conversation import ROLES, Message, ToolCall

MESSAGES_LIMIT = 2000  # of one conversation: each of the assistant's turns is rendered with all that is before it
_NAME_LENGTH = 64


class BadExample(ValueError):
    """An example that cannot be trained on. `field` is where it is wrong, and the subject of the reason where it has one."""

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.field = reason, field


@dataclass(frozen=True)
class Example:
    """One conversation to learn from; its last message is the assistant's.

    Of a preference pair that one is the chosen reply, and `rejected` the other.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)  # those that the model is offered, as OpenAI writes them
    paths: tuple[str, ...] = ()  # where in its line each message stands
    rejected: Message | None = None
    desirable: bool = True  # of kto
    remarks: tuple[str, ...] = ()  # what of it is counted, to be told


def read_conversation(value: Any, field: str = "messages") -> tuple[list[Message], list[str]]:
    """Messages that end with the assistant's, of which at least one is to be learnt; and where each stands."""
    parsed = read_messages(value, field)
    if not any(message.role == "assistant" for message in parsed):
        raise BadExample("has no assistant message; each example must end with the reply to learn", field)
    if parsed[-1].role != "assistant":
        last = f"{field}[{len(parsed) - 1}]"
        raise BadExample(f"is the last message and from the {parsed[-1].role}; it must be the assistant's", last)
    if all(message.weight == 0 for message in parsed if message.role == "assistant"):
        raise BadExample("has the weight 0 for all assistant messages; at least one must have 1 or none", field)
    return parsed, paths_of(parsed, field)


def read_messages(value: Any, field: str) -> list[Message]:
    """A list of at least one message, from anyone."""
    if not isinstance(value, list) or not value:
        raise BadExample(f"is {kind_of(value)}; it must be a list with at least one message", field)
    if len(value) > MESSAGES_LIMIT:
        raise BadExample(f"has {len(value)} messages; split the conversation, {MESSAGES_LIMIT} are taken", field)
    parsed: list[Message] = []
    for number, message in enumerate(value):
        parsed.append(_message(f"{field}[{number}]", message, parsed))
    return parsed


def read_reply(value: Any, field: str, before: list[Message]) -> Message:
    """A reply of the assistant: a text, a message, or a list of one message."""
    if isinstance(value, str):
        return Message("assistant", read_said(value, field))
    if isinstance(value, list):
        if len(value) != 1:
            raise BadExample(f"is a list of {len(value)} messages; it must be one, the assistant's reply", field)
        value, field = value[0], f"{field}[0]"
    message = _message(field, value, before)
    if message.role != "assistant":
        raise BadExample(f"is from the {message.role}; it must be the assistant's", f"{field}.role")
    return message


def read_tools(value: dict[str, Any]) -> list[dict[str, Any]]:
    """`tools`, or the older `functions`."""
    tools, functions = value.get("tools") or [], value.get("functions") or []
    for name, listed in (("tools", tools), ("functions", functions)):
        if not isinstance(listed, list):
            raise BadExample(f"is {kind_of(listed)}; it must be a list", name)
    wrapped = [{"type": "function", "function": function} for function in functions]
    places = [f"tools[{number}]" for number in range(len(tools))]
    places += [f"functions[{number}]" for number in range(len(functions))]
    return [read_tool(tool, place) for tool, place in zip([*tools, *wrapped], places, strict=True)]


def read_tool(tool: Any, field: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or tool.get("type") != "function":
        raise BadExample(f'must be {{"type": "function", "function": {{…}}}}, not {shown(tool)}', field)
    if not isinstance(function.get("name"), str) or not 0 < len(function["name"]) <= _NAME_LENGTH:
        raise BadExample(f"has the name {shown(function.get('name'))}; it must be a function's name", field)
    return dict(tool)


def read_said(value: Any, field: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str):
        raise BadExample(f"is {kind_of(value)}; it must be a string", field)
    if not value:
        raise BadExample("is empty; write the text or leave the example out", field)
    return checked(value, field)


def read_optional(value: Any, field: str) -> str:
    """A text, or "" where there is none."""
    return "" if value is None or value == "" else read_said(value, field)


def paths_of(messages: list[Message], field: str) -> list[str]:
    return [f"{field}[{number}]" for number in range(len(messages))]


def checked(text: str, field: str) -> str:
    """The text, which every tokenizer and template can take."""
    if "\0" in text:
        raise BadExample("holds a NUL character (\\u0000); take it out", field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BadExample(f"holds half of a surrogate pair (\\u{code:04x}); write the whole character", field) from error
    return text


def call_of(call_id: str, name: Any, arguments: Any, field: str) -> ToolCall:
    """A call whose arguments are a JSON text."""
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH:
        raise BadExample(f"is {shown(name)}; it must be a function's name", f"{field}.name")
    where = f"{field}.arguments"
    if not isinstance(arguments, str):
        raise BadExample(f"is {kind_of(arguments)}; it must be a string of JSON", where)
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise BadExample(f"is {shown(arguments)}, which is not JSON ({error})", where) from error
    if not isinstance(read, dict):
        raise BadExample(f"holds {kind_of(read)}; it must hold an object", where)
    return ToolCall(call_id, checked(name, f"{field}.name"), checked(arguments, where))


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value == [] and isinstance(value, list):
        return "an empty list"
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "missing or null",
    }
    return names[type(value)]


def shown(value: Any) -> str:
    """A value as it may stand in a message: short, and without control characters."""
    if value is None:
        return "null"
    return ascii(value) if len(ascii(value)) <= 40 else f"{ascii(value)[:40]}…"


def _message(where: str, value: Any, before: list[Message]) -> Message:
    if not isinstance(value, dict):
        raise BadExample(f"is {kind_of(value)}; it must be an object with 'role' and 'content'", where)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadExample(f"is {shown(role)}; it must be one of system, user, assistant, tool", f"{where}.role")
    calls = _calls(where, role, value, before)
    content = _content(f"{where}.content", value.get("content"))
    if not content and not calls and ROLES[role] not in ("system", "tool"):
        raise BadExample(
            f"is empty, and the message is from the {role}; write the text or leave it out", f"{where}.content"
        )
    thought = "reasoning" if value.get("reasoning_content") is None else "reasoning_content"
    return Message(
        ROLES[role],
        content,
        _weight(where, role, value.get("weight")),
        calls,
        _answered(where, role, value, before),
        _optional_text(where, value, "name"),
        _optional_text(where, value, thought),
    )


def _calls(where: str, role: str, value: dict[str, Any], before: list[Message]) -> tuple[ToolCall, ...]:
    """`tool_calls`, or the older `function_call`, which has no id and gets one."""
    listed, older = value.get("tool_calls") or [], value.get("function_call")
    if not listed and not older:
        return ()
    if role != "assistant":
        name = "tool_calls" if listed else "function_call"
        raise BadExample(
            f"is there on a message from the {role}; only assistant messages may have one", f"{where}.{name}"
        )
    if not isinstance(listed, list):
        raise BadExample(f"is {kind_of(listed)}; it must be a list", f"{where}.tool_calls")
    calls = [_call(f"{where}.tool_calls[{number}]", call) for number, call in enumerate(listed)]
    if older:
        call_id = f"call{1 + sum(len(message.tool_calls) for message in before):05}"
        calls.append(_called(f"{where}.function_call", call_id, older))
    return tuple(calls)


def _call(where: str, value: Any) -> ToolCall:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise BadExample('must be an object with an id, the type "function" and a function', where)
    call_id = value.get("id")
    if not isinstance(call_id, str) or not call_id:
        raise BadExample(f"is {shown(call_id)}; it must be a string, for a tool's answer to name", f"{where}.id")
    return _called(f"{where}.function", checked(call_id, f"{where}.id"), value.get("function"))


def _called(where: str, call_id: str, function: Any) -> ToolCall:
    if not isinstance(function, dict):
        raise BadExample(f"is {kind_of(function)}; it must be an object with a name and arguments", where)
    return call_of(call_id, function.get("name"), function.get("arguments"), where)


def _answered(where: str, role: str, value: dict[str, Any], before: list[Message]) -> str | None:
    """The id of the call that a tool's message answers."""
    if ROLES[role] != "tool":
        return None
    ids = [call.id for message in before for call in message.tool_calls]
    call_id = value.get("tool_call_id") if role == "tool" else (ids[-1] if ids else None)
    if call_id not in ids:
        raise BadExample(
            f"is {shown(call_id)}, which no message before it calls; it must be the id of a tool call",
            f"{where}.tool_call_id",
        )
    return str(call_id)


def _optional_text(where: str, value: dict[str, Any], name: str) -> str | None:
    text = value.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise BadExample(f"is {kind_of(text)}; it must be a string", f"{where}.{name}")
    return checked(text, f"{where}.{name}")


def _content(where: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return checked(value, where)
    if isinstance(value, list):
        return "".join(_part(f"{where}[{number}]", part) for number, part in enumerate(value))
    raise BadExample(f"is {kind_of(value)}; it must be a string", where)


def _part(where: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        raise BadExample(f"is a content part of type {shown(kind)}; only text can be trained on here", where)
    if not isinstance(value.get("text"), str):
        raise BadExample(f"is {kind_of(value.get('text'))}; it must be a string", f"{where}.text")
    return checked(value["text"], f"{where}.text")


def _weight(where: str, role: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise BadExample(f"is {shown(value)}; it must be 0 or 1", f"{where}.weight")
    if role != "assistant":
        raise BadExample(
            f"is there on a message from the {role}; only assistant messages may have one", f"{where}.weight"
        )
    return value
