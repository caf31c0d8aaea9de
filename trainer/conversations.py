"""One line's JSON → a conversation, or what is wrong with it, in the words of OpenAI's training format.

Place in the flow: jsonl → **conversations** → dataset. Pure. One rule: what cannot be trained on as it stands is refused by
name, never dropped.
"""

from __future__ import annotations

from typing import Any

from gateway.chat.conversation import Message, Role

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TOOL_ROLES = ("tool", "function")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
_NO_TOOLS = "this template cannot render tools yet; leave such examples out"


class BadExample(ValueError):
    """An example that cannot be trained on: what was found, the rule, the fix."""


def parse_example(value: Any) -> list[Message]:
    """The messages of one example. Raises BadExample."""
    if not isinstance(value, dict):
        raise BadExample(f"is {_kind(value)}; each line must be a JSON object with a list 'messages'")
    for field in ("tools", "functions"):
        if value.get(field):
            raise BadExample(f"has '{field}': {_NO_TOOLS}")
    messages = value.get("messages")
    if messages is None:
        raise BadExample(f"has no 'messages' (its keys are {_listed(value)}); each line must have a list 'messages'")
    if not isinstance(messages, list) or not messages:
        raise BadExample(f"'messages' is {_kind(messages)}; it must be a list with at least one message")
    parsed = [_message(number, message) for number, message in enumerate(messages, start=1)]
    if not any(message.role == "assistant" for message in parsed):
        raise BadExample("has no assistant message; each example must end with the reply to learn")
    if parsed[-1].role != "assistant":
        raise BadExample(
            f"message {len(parsed)}, the last one, is from the {parsed[-1].role}; it must be the assistant's"
        )
    if all(message.weight == 0 for message in parsed if message.role == "assistant"):
        raise BadExample("all assistant messages have the weight 0; at least one must have the weight 1 or none")
    return parsed


def _message(number: int, value: Any) -> Message:
    where = f"message {number}"
    if not isinstance(value, dict):
        raise BadExample(f"{where} is {_kind(value)}; it must be an object with 'role' and 'content'")
    role = value.get("role")
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise BadExample(f"{where} has the role '{role}': {_NO_TOOLS}")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadExample(f"{where} has the role {_shown(role)}; it must be one of system, user, assistant")
    for field in _TOOL_FIELDS:
        if value.get(field):
            raise BadExample(f"{where} has '{field}': {_NO_TOOLS}")
    content = _content(where, value.get("content"))
    if not content and role not in ("system", "developer"):
        raise BadExample(f"{where}, from the {role}, has no content; write the text or leave the message out")
    return Message(_ROLES[role], content, _weight(where, role, value.get("weight")))


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
