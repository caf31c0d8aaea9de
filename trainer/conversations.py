"""One line's JSON → a conversation, or what is wrong with it, in the words of OpenAI's training format.

Place in the flow: jsonl → **conversations** → dataset. Pure. One rule: what cannot be trained on as it stands is refused by
name, never dropped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from gateway.chat.conversation import ROLES, Message, ToolCall

_NAME_LENGTH = 64


class BadExample(ValueError):
    """An example that cannot be trained on: what was found, the rule, the fix."""


@dataclass(frozen=True)
class Example:
    """One conversation to learn from. `tools` are those that the model is offered in it, as OpenAI writes them."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


def parse_example(value: Any) -> Example:
    """One line of a training file. Raises BadExample."""
    if not isinstance(value, dict):
        raise BadExample(f"is {_kind(value)}; each line must be a JSON object with a list 'messages'")
    messages = value.get("messages")
    if messages is None:
        raise BadExample(f"has no 'messages' (its keys are {_listed(value)}); each line must have a list 'messages'")
    if not isinstance(messages, list) or not messages:
        raise BadExample(f"'messages' is {_kind(messages)}; it must be a list with at least one message")
    parsed: list[Message] = []
    for number, message in enumerate(messages, start=1):
        parsed.append(_message(number, message, parsed))
    if not any(message.role == "assistant" for message in parsed):
        raise BadExample("has no assistant message; each example must end with the reply to learn")
    if parsed[-1].role != "assistant":
        raise BadExample(
            f"message {len(parsed)}, the last one, is from the {parsed[-1].role}; it must be the assistant's"
        )
    if all(message.weight == 0 for message in parsed if message.role == "assistant"):
        raise BadExample("all assistant messages have the weight 0; at least one must have the weight 1 or none")
    return Example(parsed, _tools(value))


def _tools(value: dict[str, Any]) -> list[dict[str, Any]]:
    """`tools`, or the older `functions`."""
    tools, functions = value.get("tools") or [], value.get("functions") or []
    for name, listed in (("tools", tools), ("functions", functions)):
        if not isinstance(listed, list):
            raise BadExample(f"'{name}' is {_kind(listed)}; it must be a list")
    whole = [*tools, *({"type": "function", "function": function} for function in functions)]
    for number, tool in enumerate(whole, start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise BadExample(f'tool {number} must be {{"type": "function", "function": {{…}}}}, not {_shown(tool)}')
        if not isinstance(function.get("name"), str) or not 0 < len(function["name"]) <= _NAME_LENGTH:
            raise BadExample(f"tool {number} has the name {_shown(function.get('name'))}; it must be a function's name")
    return whole


def _message(number: int, value: Any, before: list[Message]) -> Message:
    where = f"message {number}"
    if not isinstance(value, dict):
        raise BadExample(f"{where} is {_kind(value)}; it must be an object with 'role' and 'content'")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadExample(f"{where} has the role {_shown(role)}; it must be one of system, user, assistant, tool")
    calls = _calls(where, role, value, before)
    content = _content(where, value.get("content"))
    if not content and not calls and ROLES[role] not in ("system", "tool"):
        raise BadExample(f"{where}, from the {role}, has no content; write the text or leave the message out")
    return Message(
        ROLES[role],
        content,
        _weight(where, role, value.get("weight")),
        calls,
        _answered(where, role, value, before),
        _optional_text(where, value, "name"),
        _optional_text(where, value, "reasoning" if value.get("reasoning_content") is None else "reasoning_content"),
    )


def _calls(where: str, role: str, value: dict[str, Any], before: list[Message]) -> tuple[ToolCall, ...]:
    """`tool_calls`, or the older `function_call`, which has no id and gets one."""
    listed, older = value.get("tool_calls") or [], value.get("function_call")
    if not listed and not older:
        return ()
    if role != "assistant":
        raise BadExample(f"{where}, from the {role}, has a tool call; only assistant messages may have one")
    if not isinstance(listed, list):
        raise BadExample(f"{where}: 'tool_calls' is {_kind(listed)}; it must be a list")
    if older:
        listed = [*listed, {"id": _older_id(before), "type": "function", "function": older}]
    return tuple(_call(f"{where}, tool call {number}", call) for number, call in enumerate(listed, start=1))


def _call(where: str, value: Any) -> ToolCall:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or value.get("type", "function") != "function":
        raise BadExample(f'{where} must be an object with an id, the type "function" and a function')
    call_id, name, arguments = value.get("id"), function.get("name"), function.get("arguments")
    if not isinstance(call_id, str) or not call_id:
        raise BadExample(f"{where} has the id {_shown(call_id)}; it must be a string, for a tool's answer to name")
    if not isinstance(name, str) or not 0 < len(name) <= _NAME_LENGTH:
        raise BadExample(f"{where} has the name {_shown(name)}; it must be a function's name")
    if not isinstance(arguments, str):
        raise BadExample(f"{where}: 'arguments' is {_kind(arguments)}; it must be a string of JSON")
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise BadExample(f"{where}: 'arguments' is {_shown(arguments)}, which is not JSON ({error})") from error
    if not isinstance(read, dict):
        raise BadExample(f"{where}: 'arguments' holds {_kind(read)}; it must hold an object")
    return ToolCall(call_id, name, _checked(where, arguments))


def _answered(where: str, role: str, value: dict[str, Any], before: list[Message]) -> str | None:
    """The id of the call that a tool's message answers."""
    if ROLES[role] != "tool":
        return None
    ids = [call.id for message in before for call in message.tool_calls]
    call_id = value.get("tool_call_id") if role == "tool" else (ids[-1] if ids else None)
    if call_id not in ids:
        raise BadExample(
            f"{where} answers the tool call {_shown(call_id)}, which no message before it makes; 'tool_call_id' must be the id "
            "of one"
        )
    return str(call_id)


def _older_id(before: list[Message]) -> str:
    return f"call{1 + sum(len(message.tool_calls) for message in before):05}"


def _optional_text(where: str, value: dict[str, Any], name: str) -> str | None:
    text = value.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise BadExample(f"{where}: '{name}' is {_kind(text)}; it must be a string")
    return _checked(where, text)


def _content(where: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _checked(where, value)
    if isinstance(value, list):
        return "".join(_part(where, part) for part in value)
    raise BadExample(f"{where}: 'content' is {_kind(value)}; it must be a string")


def _part(where: str, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text":
        raise BadExample(f"{where} has a content part of type {_shown(kind)}; only text can be trained on here")
    if not isinstance(value.get("text"), str):
        raise BadExample(f"{where} has a text part whose 'text' is {_kind(value.get('text'))}; it must be a string")
    return _checked(where, value["text"])


def _checked(where: str, text: str) -> str:
    if "\0" in text:
        raise BadExample(f"{where} holds a NUL character (\\u0000); take it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadExample(
            f"{where} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}); write the whole character"
        ) from error
    return text


def _weight(where: str, role: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise BadExample(f"{where} has the weight {_shown(value)}; it must be 0 or 1")
    if role != "assistant":
        raise BadExample(f"{where}, from the {role}, has a weight; only assistant messages may have one")
    return value


def _kind(value: Any) -> str:
    if value == [] and isinstance(value, list):
        return "an empty list"
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]


def _shown(value: Any) -> str:
    """A value as it may stand in a message: short, and without control characters."""
    if value is None:
        return "null"
    return ascii(value) if len(ascii(value)) <= 40 else f"{ascii(value)[:40]}…"


def _listed(value: dict[str, Any]) -> str:
    return ", ".join(_shown(key) for key in list(value)[:8]) or "none"
