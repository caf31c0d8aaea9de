"""The items of `/v1/responses`: what a client sends as `input`, stored under ids, and read into a conversation. Pure."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.chat.conversation import ROLES, Message, ToolCall
from gateway.errors import RequestError
from gateway.wire.fields import show

Item = dict[str, Any]

MAX_ITEMS = 10_000
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_KNOWN = "message, function_call, function_call_output, reasoning, compaction"


def parse_input(raw: Any) -> list[Item]:
    """`input` as items, each with an id and in the form in which they are listed; a text is a user's message.

    Raises RequestError that names the item, its value and the rule.
    """
    if raw is None:
        return []
    if isinstance(raw, str):
        return [_message({"role": "user", "content": raw}, "input")]
    if not isinstance(raw, list):
        raise RequestError(f"'input' must be a string or a list of items, not {show(raw)}", param="input")
    if len(raw) > MAX_ITEMS:
        raise RequestError(f"'input' has {len(raw)} items; at most {MAX_ITEMS} are taken", param="input")
    return [_item(item, f"input[{number}]") for number, item in enumerate(raw)]


def to_messages(items: Sequence[Item]) -> list[Message]:
    """The conversation that items tell of: reasoning, text and calls that follow one another are one turn."""
    spoken: list[Message] = []
    turn = _Turn()
    for item in items:
        kind = item["type"]
        if kind == "reasoning" or (kind == "message" and item["role"] == "assistant"):
            if turn.is_begun and (turn.has_text or turn.calls or kind == "reasoning"):
                spoken.append(turn.message())
                turn = _Turn()
            if kind == "reasoning":
                turn.reasoning = _text(item.get("content") or item["summary"])
            else:
                turn.text.append(_text(item["content"]))
            continue
        if kind == "function_call":
            turn.calls.append(ToolCall(item["call_id"], item["name"], item["arguments"]))
            continue
        if turn.is_begun:
            spoken.append(turn.message())
            turn = _Turn()
        if kind == "function_call_output":
            output = item["output"]
            text = output if isinstance(output, str) else _text(output)
            spoken.append(Message("tool", text, tool_call_id=item["call_id"]))
        elif kind == "compaction":
            spoken.append(Message("system", read_compaction(item)))
        else:
            spoken.append(Message(ROLES[item["role"]], _text(item["content"])))
    if turn.is_begun:
        spoken.append(turn.message())
    return spoken


@dataclass(slots=True)
class _Turn:
    """What the model said in a row."""

    reasoning: str | None = None
    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def has_text(self) -> bool:
        return bool(self.text)

    @property
    def is_begun(self) -> bool:
        return bool(self.text or self.calls or self.reasoning is not None)

    def message(self) -> Message:
        return Message("assistant", "".join(self.text), tool_calls=tuple(self.calls), reasoning=self.reasoning or None)


def new_item_id(prefix: str) -> str:
    return prefix + secrets.token_hex(24)


def compaction(text: str) -> Item:
    """What stands for a conversation that was cut short. It is no secret: its bytes are merely not for reading."""
    return {
        "id": new_item_id("cmp_"),
        "type": "compaction",
        "encrypted_content": _COMPACTED + text.encode().hex(),
    }


def read_compaction(item: Item) -> str:
    """The text in a compaction. Raises RequestError for what was not made here."""
    content = item.get("encrypted_content")
    try:
        if not isinstance(content, str) or not content.startswith(_COMPACTED):
            raise ValueError
        return bytes.fromhex(content.removeprefix(_COMPACTED)).decode()
    except ValueError as error:
        raise RequestError(
            "a compaction's 'encrypted_content' must be as /v1/responses/compact of this server gave it", param="input"
        ) from error


_COMPACTED = "tunegate1:"


def _item(raw: Any, where: str) -> Item:
    if not isinstance(raw, dict):
        raise RequestError(f"'{where}' must be an object, an item of the input, not {show(raw)}", param=where)
    kind = raw.get("type", "message" if "role" in raw else None)
    if kind == "message":
        return _message(raw, where)
    if kind == "function_call":
        return {
            "id": _id(raw, "fc_"),
            "type": kind,
            "call_id": _required(raw, "call_id", where),
            "name": _required(raw, "name", where, 64),
            "arguments": _string(raw, "arguments", where),
            "status": "completed",
        }
    if kind == "function_call_output":
        output = raw.get("output")
        if not isinstance(output, str):
            output = _parts(output, f"{where}.output", "input_text")
        call_id = _required(raw, "call_id", where)
        return {"id": _id(raw, "fc_"), "type": kind, "call_id": call_id, "output": output, "status": "completed"}
    if kind == "reasoning":
        parts = {
            name: _parts(raw.get(name) or [], f"{where}.{name}", part)
            for name, part in (("summary", "summary_text"), ("content", "reasoning_text"))
        }
        return {"id": _id(raw, "rs_"), "type": kind, **parts, "status": "completed"}
    if kind == "compaction":
        read_compaction(raw)
        return {"id": _id(raw, "cmp_"), "type": kind, "encrypted_content": raw["encrypted_content"]}
    if kind == "item_reference":
        raise RequestError(
            f"'{where}' refers to an item; send the item itself, or 'previous_response_id'", param=f"{where}.type"
        )
    raise RequestError(f"'{where}.type' must be one of {_KNOWN}, not {show(kind)}", param=f"{where}.type")


def _message(raw: Item, where: str) -> Item:
    role = raw.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise RequestError(
            f"'{where}.role' must be one of user, assistant, system, developer, not {show(role)}", param=f"{where}.role"
        )
    by_model = role == "assistant"
    content = raw.get("content")
    parts = _parts(
        [{"type": "text", "text": content}] if isinstance(content, str) else content,
        f"{where}.content",
        "output_text" if by_model else "input_text",
    )
    return {"id": _id(raw, "msg_"), "type": "message", "role": role, "status": "completed", "content": parts}


def _parts(raw: Any, where: str, kind: str) -> list[Item]:
    """Parts of text, each as `kind` has it."""
    if not isinstance(raw, list) or len(raw) > MAX_ITEMS:
        raise RequestError(f"'{where}' must be a string or a list of parts, not {show(raw)}", param=where)
    return [_part(part, f"{where}[{number}]", kind) for number, part in enumerate(raw)]


def _part(raw: Any, where: str, kind: str) -> Item:
    given = raw.get("type") if isinstance(raw, dict) else None
    text = raw.get("refusal" if given == "refusal" else "text") if isinstance(raw, dict) else None
    if given not in (*_TEXTS, "refusal") or not isinstance(text, str):
        rule = (
            "only text is supported" if isinstance(given, str) and given not in _TEXTS else "it has a type and a text"
        )
        raise RequestError(f"'{where}' is {show(raw)}; {rule}", param=f"{where}.type")
    if kind == "output_text":
        return {"type": kind, "text": text, "annotations": [], "logprobs": []}
    return {"type": kind, "text": text}


def _text(parts: Sequence[Item]) -> str:
    return "".join(part["text"] for part in parts)


def _id(raw: Item, prefix: str) -> str:
    given = raw.get("id")
    return given if isinstance(given, str) and 0 < len(given) <= 200 else new_item_id(prefix)


def _required(raw: Item, name: str, where: str, longest: int = 1000) -> str:
    value = _string(raw, name, where)
    if not 1 <= len(value) <= longest:
        raise RequestError(
            f"'{where}.{name}' must have 1 to {longest} characters, not {len(value)}", param=f"{where}.{name}"
        )
    return value


def _string(raw: Item, name: str, where: str) -> str:
    value = raw.get(name)
    if not isinstance(value, str):
        raise RequestError(f"'{where}.{name}' must be a string, not {show(value)}", param=f"{where}.{name}")
    return value
