"""Tools in a chat request: what the model may call and must call, in today's form and in the older `functions`. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from gateway.chat.speech import NO_TOOLS, ToolUse
from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body, show
from gateway.wire.structured import Structured, strict_parameters

TOOL_FIELDS = frozenset(("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"))
_TOOL_LIMIT = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """What may be called, and how a reply tells of it.

    `finish_reason` is that of a reply with calls: "stop" where one function was named, as at OpenAI. `older` replies
    with `function_call`. `arguments` is what those of a named `strict` function are held to.
    """

    use: ToolUse = NO_TOOLS
    finish_reason: str = "tool_calls"
    older: bool = False
    arguments: Structured | None = None


def parse_tools(body: Body) -> ToolRequest:
    """Raises RequestError that names the field, its value and the rule."""
    parallel = fields.boolean(body, "parallel_tool_calls")
    withdrawn = body.get("function_call") == "none" and body.get("tools")
    if (body.get("functions") or body.get("function_call") is not None) and not withdrawn:
        return _parse_functions(body)
    tools, choice = _allowed(_tools(body.get("tools")), body.get("tool_choice"))
    names = tuple(tool["function"]["name"] for tool in tools)
    forced = _forced(choice, names)
    if choice == "none" or not tools:
        return ToolRequest()
    named = isinstance(choice, dict)
    use = ToolUse(tools, forced, single=named or parallel is False)
    if not named:
        return ToolRequest(use)
    at = names.index(forced[0])
    return ToolRequest(use, "stop", arguments=strict_parameters(tools[at]["function"], f"tools[{at}].function"))


def _parse_functions(body: Body) -> ToolRequest:
    """`functions` and `function_call`, which OpenAI still takes."""
    for name in ("tools", "tool_choice"):
        if body.get(name):
            raise RequestError(f"'{name}' cannot be sent together with the older 'functions'", param=name)
    raw: Any = body.get("functions")
    choice: Any = body.get("function_call")
    if raw is not None and not isinstance(raw, list):
        raise RequestError(f"'functions' must be a list, not {show(raw)}", param="functions")
    _check_count(raw or [], "functions")
    functions = [_function(function, f"functions[{n}]") for n, function in enumerate(raw or [])]
    tools = _distinct(tuple({"type": "function", "function": function} for function in functions), "functions")
    names = [function["name"] for function in functions]
    named = isinstance(choice, dict)
    if named and choice.get("name") not in names:
        known = ", ".join(names) or "none"
        raise RequestError(
            f"'function_call' names {show(choice.get('name'))}; 'functions' has: {known}", param="function_call"
        )
    if not named and choice not in (None, "none", "auto"):
        raise RequestError(
            f'\'function_call\' must be "none", "auto" or an object with a name, not {show(choice)}',
            param="function_call",
        )
    if choice == "none" or not tools:
        return ToolRequest(older=True)
    forced = (choice["name"],) if named else ()
    return ToolRequest(ToolUse(tools, forced, single=True), "stop" if named else "function_call", older=True)


def _allowed(tools: tuple[dict[str, Any], ...], choice: Any) -> tuple[tuple[dict[str, Any], ...], Any]:
    """The tools that `allowed_tools` leaves, and its mode as the choice among them."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return tools, choice
    told = choice.get("allowed_tools", choice)  # chat puts mode and tools one level deeper than responses do
    listed, mode = (told.get("tools"), told.get("mode")) if isinstance(told, dict) else (None, None)
    if not isinstance(listed, list) or mode not in ("auto", "required"):
        raise RequestError(
            f'\'tool_choice\' of type allowed_tools needs a mode, "auto" or "required", and tools, not {show(choice)}',
            param="tool_choice",
        )
    _check_count(listed, "tool_choice.tools")
    functions = [tool.get("function") if isinstance(tool, dict) else None for tool in listed]
    named = [_function(function, "tool_choice.tools")["name"] for function in functions]
    known = [tool["function"]["name"] for tool in tools]
    for name in named:
        if name not in known:
            raise RequestError(
                f"'tool_choice' allows the function {show(name)}; 'tools' has: {', '.join(known) or 'none'}"[:400],
                param="tool_choice",
            )
    return tuple(tool for tool in tools if tool["function"]["name"] in named), mode


def _tools(raw: Any) -> tuple[dict[str, Any], ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise RequestError(f"'tools' must be a list, not {show(raw)}", param="tools")
    _check_count(raw, "tools")
    return _distinct(tuple(_tool(tool, f"tools[{number}]") for number, tool in enumerate(raw)), "tools")


def _tool(raw: Any, where: str) -> dict[str, Any]:
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind != "function":
        extra = "; custom tools need a grammar in the engine, which is not supported yet" if kind == "custom" else ""
        raise RequestError(f"'{where}.type' must be \"function\", not {show(kind)}{extra}", param=f"{where}.type")
    return {"type": "function", "function": _function(raw.get("function"), f"{where}.function")}


def _function(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RequestError(f"'{where}' must be an object with a name, not {show(raw)}", param=where)
    name, description, parameters = raw.get("name"), raw.get("description"), raw.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"'{where}.name' must be 1 to 64 letters, digits, underscores or dashes, not {show(name)}",
            param=f"{where}.name",
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(
            f"'{where}.description' must be a string, not {show(description)}", param=f"{where}.description"
        )
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(
            f"'{where}.parameters' must be a JSON schema, an object, not {show(parameters)}",
            param=f"{where}.parameters",
        )
    if raw.get("strict") is not None and not isinstance(raw["strict"], bool):
        raise RequestError(
            f"'{where}.strict' must be true or false, not {show(raw['strict'])}", param=f"{where}.strict"
        )
    return raw


def _forced(choice: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Which functions the reply must begin a call of; empty: it is free."""
    if choice in (None, "none", "auto"):
        return ()
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "custom":
        raise RequestError(
            f"'tool_choice.type' {show(kind)} is not supported yet; name a function",
            param="tool_choice",
        )
    function = choice.get("function") if kind == "function" else None
    named = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(named, str):
        raise RequestError(
            '\'tool_choice\' must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}, '
            f"not {show(choice)}",
            param="tool_choice",
        )
    if not names:
        raise RequestError("'tool_choice' is only taken together with 'tools'", param="tool_choice")
    if choice == "required":
        return names
    if named not in names:
        raise RequestError(
            f"'tool_choice' names the function {show(named)}; 'tools' has: {', '.join(names)}"[:400],
            param="tool_choice",
        )
    return (str(named),)


def _check_count(raw: list[Any], where: str) -> None:
    if len(raw) > _TOOL_LIMIT:
        raise RequestError(f"'{where}' has {len(raw)} entries; at most {_TOOL_LIMIT} are taken", param=where)


def _distinct(tools: tuple[dict[str, Any], ...], where: str) -> tuple[dict[str, Any], ...]:
    seen: set[str] = set()
    for tool in tools:
        name = tool["function"]["name"]
        if name in seen:
            raise RequestError(f"'{where}' holds the function '{name}' twice; names must differ", param=where)
        seen.add(name)
    return tools
