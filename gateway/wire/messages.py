"""The messages of a chat request: OpenAI's forms, today's and older, read into conversations. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gateway.chat.conversation import ROLES, Message, ToolCall
from gateway.errors import RequestError
from gateway.wire.fields import Body, show

_MESSAGE_LIMIT, _CALL_LIMIT = 10_000, 128


def parse_messages(body: Body) -> list[Message]:
    """`messages`. Raises RequestError that names the message, its value and the rule."""
    raw = body.get("messages")
    if not isinstance(raw, list) or not raw:
        raise RequestError(f"'messages' must be a list with at least one message, not {show(raw)}", param="messages")
    if len(raw) > _MESSAGE_LIMIT:
        raise RequestError(f"'messages' has {len(raw)} entries; at most {_MESSAGE_LIMIT} are taken", param="messages")
    older = _OlderCalls()
    return [_message(message, f"messages[{number}]", older) for number, message in enumerate(raw)]


@dataclass(slots=True)
class _OlderCalls:
    """`function_call` has no id: the result that comes after it gets the one that it was given here."""

    count: int = 0

    @property
    def last_id(self) -> str:
        return f"call{self.count:05}"


def _message(raw: Any, where: str, older: _OlderCalls) -> Message:
    if not isinstance(raw, dict):
        raise RequestError(f"'{where}' must be an object with role and content, not {show(raw)}", param=where)
    written = raw.get("role")
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        raise RequestError(
            f"'{where}.role' must be one of system, developer, user, assistant, tool, not {show(written)}",
            param=f"{where}.role",
        )
    if role == "assistant":
        return _assistant(raw, where, older)
    for field in ("tool_calls", "function_call"):
        if raw.get(field):
            raise RequestError(
                f"'{where}.{field}' belongs to messages of the assistant, not of the {role}", param=f"{where}.{field}"
            )
    content = _content(raw.get("content"), f"{where}.content")
    name = _string(raw, "name", where)
    if role == "tool":
        call_id = older.last_id if written == "function" else _string(raw, "tool_call_id", where)
        if not call_id:
            raise RequestError(
                f"'{where}.tool_call_id' must be the id of the call that this message answers",
                param=f"{where}.tool_call_id",
            )
        return Message(role, content, tool_call_id=call_id, name=name)
    return Message(role, content, name=name)


def _assistant(raw: dict[str, Any], where: str, older: _OlderCalls) -> Message:
    calls = _tool_calls(raw.get("tool_calls"), f"{where}.tool_calls")
    if raw.get("function_call") is not None:
        older.count += 1
        calls = (*calls, ToolCall(older.last_id, *_called(raw["function_call"], f"{where}.function_call")))
    content = raw.get("content")
    if content is None and isinstance(raw.get("refusal"), str):
        content = raw["refusal"]
    if content is None and calls:
        content = ""
    reasoning = _string(raw, "reasoning_content", where)
    if reasoning is None:
        reasoning = _string(raw, "reasoning", where)
    return Message(
        "assistant",
        _content(content, f"{where}.content"),
        tool_calls=calls,
        name=_string(raw, "name", where),
        reasoning=reasoning,
    )


def _tool_calls(raw: Any, where: str) -> tuple[ToolCall, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list) or len(raw) > _CALL_LIMIT:
        raise RequestError(f"'{where}' must be a list of at most {_CALL_LIMIT} calls, not {show(raw)}", param=where)
    return tuple(_tool_call(call, f"{where}[{number}]") for number, call in enumerate(raw))


def _tool_call(raw: Any, where: str) -> ToolCall:
    if not isinstance(raw, dict):
        raise RequestError(f"'{where}' must be an object with id, type and function, not {show(raw)}", param=where)
    if raw.get("type", "function") != "function":
        raise RequestError(f"'{where}.type' must be \"function\", not {show(raw['type'])}", param=f"{where}.type")
    call_id = raw.get("id")
    if not isinstance(call_id, str) or not call_id:
        raise RequestError(f"'{where}.id' must be a string that is not empty, not {show(call_id)}", param=f"{where}.id")
    return ToolCall(call_id, *_called(raw.get("function"), f"{where}.function"))


def _called(raw: Any, where: str) -> tuple[str, str]:
    """The name and the arguments; what the model wrote is taken back even where it is no JSON."""
    name = raw.get("name") if isinstance(raw, dict) else None
    arguments = raw.get("arguments") if isinstance(raw, dict) else None
    if not isinstance(name, str) or not name or len(name) > 64:
        raise RequestError(f"'{where}.name' must be a function's name, not {show(name)}", param=f"{where}.name")
    if not isinstance(arguments, str):
        raise RequestError(
            f"'{where}.arguments' must be a string of JSON, not {show(arguments)}", param=f"{where}.arguments"
        )
    return name, arguments


def _content(raw: Any, where: str) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list):
        return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(raw))
    raise RequestError(f"'{where}' must be a string or a list of parts, not {show(raw)}", param=where)


def _part(raw: Any, where: str) -> str:
    kind = raw.get("type") if isinstance(raw, dict) else None
    text = raw.get("text" if kind == "text" else "refusal") if isinstance(raw, dict) else None
    if kind in ("text", "refusal") and isinstance(text, str):
        return text
    if kind in ("text", "refusal") or kind is None:
        raise RequestError(f'\'{where}\' must be {{"type": "text", "text": …}}, not {show(raw)}', param=where)
    raise RequestError(f"'{where}.type' is {show(kind)}; only text is supported", param=f"{where}.type")


def _string(raw: dict[str, Any], name: str, where: str) -> str | None:
    value = raw.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"'{where}.{name}' must be a string, not {show(value)}", param=f"{where}.{name}")
    return value
