"""ShareGPT's form: conversations of {"from", "value"}, beside them `system` and `tools`; also preference pairs of it.

As FastChat's guide does it: what comes before the first human turn is left out, as is a last one without an answer, and a
conversation whose roles do not take turns is dropped. All of it is counted and told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gateway.chat.conversation import Message, Role
from trainer.data.conversations import (
    MESSAGES_LIMIT,
    BadExample,
    Example,
    call_of,
    kind_of,
    read_optional,
    read_said,
    read_tool,
    shown,
)

CALL = "function_call"
_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "system": "system",
}
CUT = "without their first or last turns, which no human asks or no model answers"


def read_conversation(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """None where the conversation is dropped; `remarks` of what is left say what was left out."""
    system, turns = _turns(line)
    users = [number for number, (_, turn) in enumerate(turns) if turn.role == "user"]
    replies = [number for number, (_, turn) in enumerate(turns) if turn.role == "assistant"]
    kept = turns[users[0] : replies[-1] + 1] if users and replies else []
    if not _takes_turns([turn for _, turn in kept]):
        return []
    tools = _tools(line)
    remarks = [*(["with tools"] if tools else []), *([CUT] if len(kept) < len(turns) else [])]
    paths, messages = zip(*system, *kept, strict=True)
    return [Example(list(messages), tools, paths, remarks=tuple(remarks))]


def read_preference(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """{"conversations": […up to a human turn…], "chosen": {"from", "value"}, "rejected": {…}}."""
    system, turns = _turns(line)
    before = [turn for _, turn in turns]
    chosen, rejected = (_turn(line.get(name), name, before) for name in ("chosen", "rejected"))
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if reply.role != "assistant":
            raise BadExample(f"is from the {reply.role}; it must be the model's reply (gpt)", f"{name}.from")
    if not _takes_turns([*before, chosen]):
        return []
    tools = _tools(line)
    paths, messages = zip(*system, *turns, ("chosen", chosen), strict=True)
    return [Example(list(messages), tools, paths, rejected, remarks=("with tools",) if tools else ())]


_Turns = list[tuple[str, Message]]  # each with where it stands


def _turns(line: Mapping[str, Any]) -> tuple[_Turns, _Turns]:
    """The system message, if there is one, and the turns."""
    listed = line.get("conversations")
    if not isinstance(listed, list):
        raise BadExample(f"is {kind_of(listed)}; it must be a list of turns", "conversations")
    if len(listed) > MESSAGES_LIMIT:
        raise BadExample(
            f"has {len(listed)} turns; split the conversation, {MESSAGES_LIMIT} are taken", "conversations"
        )
    turns: list[Message] = []
    for number, turn in enumerate(listed):
        turns.append(_turn(turn, f"conversations[{number}]", turns))
    placed = [(f"conversations[{number}]", turn) for number, turn in enumerate(turns)]
    system = [placed.pop(0)] if turns and turns[0].role == "system" else []
    if said := read_optional(line.get("system"), "system"):
        system = [("system", Message("system", said))]
    return [one for one in system if one[1].content], placed


def _turn(value: Any, where: str, before: list[Message]) -> Message:
    if not isinstance(value, dict):
        raise BadExample(f"is {kind_of(value)}; it must be an object with 'from' and 'value'", where)
    speaker, said = value.get("from"), value.get("value")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise BadExample(f"is {shown(speaker)}; it must be one of {', '.join(_ROLES)}", f"{where}.from")
    if role == "system":
        return Message(role, read_optional(said, f"{where}.value"))
    if role == "tool":
        text = read_optional(said if isinstance(said, str) else json.dumps(said), f"{where}.value")
        return Message(role, text, tool_call_id=_answered(before))
    if isinstance(speaker, str) and speaker.lower() == CALL:
        return _call_turn(said, f"{where}.value", before)
    return Message(role, read_said(said, f"{where}.value"))


def _call_turn(said: Any, where: str, before: list[Message]) -> Message:
    """One call {"name", "arguments"}, or a list of them, as JSON in a text."""
    listed = _json(said, where)
    listed = listed if isinstance(listed, list) else [listed]
    first = 1 + sum(len(message.tool_calls) for message in before)
    calls = []
    for number, call in enumerate(listed):
        if not isinstance(call, dict):
            raise BadExample(f"holds {kind_of(call)}; a call must be an object with 'name' and 'arguments'", where)
        arguments = call.get("arguments", {})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(call_of(f"call{first + number:05}", call.get("name"), text, where))
    if not calls:
        raise BadExample("holds no call", where)
    return Message("assistant", "", tool_calls=tuple(calls))


def _answered(before: list[Message]) -> str | None:
    """The id of the call whose result comes now: results come in the order of their calls."""
    results = 0
    for turn in reversed(before):
        if turn.tool_calls:
            return turn.tool_calls[min(results, len(turn.tool_calls) - 1)].id
        results += turn.role == "tool"
    return None


def _takes_turns(turns: list[Message]) -> bool:
    """Human, then calls and their results, then the model; and again."""
    after: dict[str, tuple[str, ...]] = {
        "start": ("user",),
        "user": ("assistant", CALL),
        CALL: ("tool",),
        "tool": ("tool", CALL, "assistant"),
        "assistant": ("user",),
    }
    state = "start"
    for turn in turns:
        following = CALL if turn.tool_calls else turn.role
        if following not in after[state]:
            return False
        state = following
    return state in ("assistant", CALL)


def _tools(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A list, or one as JSON in a text; its tools wrapped as OpenAI's, or bare functions."""
    value = line.get("tools")
    if isinstance(value, str):
        value = _json(value, "tools") if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadExample(f"is {kind_of(value)}; it must be a list of functions", "tools")
    return [
        read_tool(
            tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool},
            f"tools[{number}]",
        )
        for number, tool in enumerate(value)
    ]


def _json(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadExample(f"is {shown(value)}, which is not JSON ({error})", where) from error
