"""OpenAI's own forms: a conversation in `messages`, and preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.conversations import (
    BadExample,
    Example,
    kind_of,
    paths_of,
    read_conversation,
    read_reply,
    read_tools,
)
from trainer.data.conversations import (
    read_messages as _read_messages,
)


def read_messages(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """{"messages": […], "tools": […]}; an assistant's message may have a weight of 0 or 1."""
    messages, paths = read_conversation(line.get("messages"))
    tools = read_tools(dict(line))
    remarks = ["with tools"] if tools or any(message.tool_calls for message in messages) else []
    remarks += ["with weights"] if any(message.weight == 0 for message in messages) else []
    return [Example(messages, tools, tuple(paths), remarks=tuple(remarks))]


def read_preference(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """{"input": {"messages", "tools"}, "preferred_output": [reply], "non_preferred_output": [reply]}."""
    given = line.get("input")
    if not isinstance(given, dict):
        raise BadExample(f"is {kind_of(given)}; it must be an object with 'messages'", "input")
    before = _read_messages(given.get("messages"), "input.messages")
    if before[-1].role == "assistant":
        raise BadExample(
            "is the assistant's; the input must end before the reply", f"input.messages[{len(before) - 1}]"
        )
    try:
        tools = read_tools(given)
    except BadExample as error:
        raise BadExample(error.reason, f"input.{error.field}") from error
    chosen, rejected = (
        read_reply(line.get(name), name, before) for name in ("preferred_output", "non_preferred_output")
    )
    paths = (*paths_of(before, "input.messages"), "preferred_output[0]")
    return [Example([*before, chosen], tools, paths, rejected, remarks=("with tools",) if tools else ())]
