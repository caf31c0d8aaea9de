"""What a conversation is, once the wire's many forms are read away: roles, text, and what was called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
# As requests and training files name them.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
Tools = Sequence[
    Mapping[str, Any]
]  # as OpenAI sends them: {"type": "function", "function": {"name", "description", …}}
Options = Mapping[str, Any]  # render options: "date" (YYYY-MM-DD), and a template's own ("enable_thinking", …)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant made; `arguments` is the JSON text that it wrote."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn in the prompt but out of the loss; None means 1."""

    role: Role
    content: str
    weight: int | None = None
    tool_calls: tuple[ToolCall, ...] = ()  # of an assistant
    tool_call_id: str | None = None  # of a tool's answer: the call that it answers
    name: str | None = None  # the function that a tool's answer comes from, or the speaker
    reasoning: str | None = None  # what an assistant thought before its reply


class RenderError(ValueError):
    """A conversation that a template cannot express; says which message and why."""


def merge_system(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    """The system text (several are joined by a blank line; None when there is none) and the turns without it."""
    system = [message.content for message in messages if message.role == "system"]
    return ("\n\n".join(system) if system else None), [message for message in messages if message.role != "system"]


def alternate(turns: Sequence[Message], template: str) -> list[Message]:
    """Turns as user, assistant, user, … for templates that know nothing else: neighbours of one role are joined."""
    merged: list[Message] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1] = replace(merged[-1], content=f"{merged[-1].content}\n\n{turn.content}", weight=turn.weight)
        else:
            merged.append(turn)
    if merged and merged[0].role != "user":
        raise RenderError(
            f"the template '{template}' needs the first message after the system message to come from the user, "
            f"not from the {merged[0].role}"
        )
    return merged


def refuse_tools(messages: Sequence[Message], tools: Tools | None, template: str) -> None:
    """Raises RenderError when there is a tool, a call or a result, for templates that cannot write them."""
    if tools:
        raise RenderError(f"the template '{template}' cannot offer tools to the model; use a model whose template can")
    for number, message in enumerate(messages):
        if message.tool_calls or message.role == "tool":
            what = "a tool's result" if message.role == "tool" else "a tool call"
            raise RenderError(f"messages[{number}] holds {what}, and the template '{template}' cannot write it")
