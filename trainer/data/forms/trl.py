"""The forms of TRL's data sets: prompt and completion, preference pairs, and replies that were judged one by one (KTO).

Each text may also be a list of OpenAI's messages, as TRL has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.chat.conversation import Message
from trainer.data.conversations import (
    BadExample,
    Example,
    kind_of,
    paths_of,
    read_conversation,
    read_messages,
    read_reply,
    read_said,
    read_tools,
)


def read_completion(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """{"prompt", "completion"}: the user's turn and the assistant's, as they stand."""
    before, paths = _prompt(line)
    reply = read_reply(line.get("completion"), "completion", before)
    return [Example([*before, reply], read_tools(dict(line)), (*paths, "completion"))]


def read_preference(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """{"prompt", "chosen", "rejected"}; without a prompt, it is what both conversations begin with."""
    tools = read_tools(dict(line))
    listed = [line.get(name) for name in ("chosen", "rejected")]
    if not isinstance(line.get("prompt"), list) and any(isinstance(one, list) and len(one) > 1 for one in listed):
        return [_parted(line, tools)]
    before, paths = _prompt(line)
    chosen, rejected = (read_reply(line.get(name), name, before) for name in ("chosen", "rejected"))
    return [Example([*before, chosen], tools, (*paths, "chosen"), rejected)]


def read_judged(line: Mapping[str, Any], _: bool = False) -> list[Example]:
    """{"prompt" or "messages", "completion", "label": true or false}; the reply may also be the last of the messages."""
    label = line.get("label")
    if not isinstance(label, bool):
        raise BadExample(f"is {kind_of(label)}; it must be true (desirable) or false", "label")
    tools = read_tools(dict(line))
    remarks = ("desirable" if label else "undesirable",)
    before, paths = _prompt(line)
    if "completion" in line:
        reply, paths = read_reply(line["completion"], "completion", before), [*paths, "completion"]
    elif before[-1].role == "assistant":
        *before, reply = before
    else:
        raise BadExample("is missing, and the last of the messages is not the assistant's", "completion")
    return [Example([*before, reply], tools, tuple(paths), desirable=label, remarks=remarks)]


def _prompt(line: Mapping[str, Any]) -> tuple[list[Message], list[str]]:
    name = "messages" if "messages" in line and "prompt" not in line else "prompt"
    prompt = line.get(name)
    if isinstance(prompt, list):
        before = read_messages(prompt, name)
        return before, paths_of(before, name)
    return [Message("user", read_said(prompt, name))], [name]


def _parted(line: Mapping[str, Any], tools: list[dict[str, Any]]) -> Example:
    """Two conversations that are the same but for their last message. A `prompt` beside them repeats theirs."""
    chosen, rejected = (read_conversation(line.get(name), name)[0] for name in ("chosen", "rejected"))
    prompt = line.get("prompt")
    if prompt is not None and not any(message.content == prompt for message in chosen[:-1]):
        raise BadExample("is not among the messages that 'chosen' begins with", "prompt")
    if chosen[:-1] != rejected[:-1]:
        raise BadExample(
            "differs from 'chosen' before its last message; the two may differ in the reply only", "rejected"
        )
    return Example(chosen, tools, tuple(paths_of(chosen, "chosen")), rejected[-1])
