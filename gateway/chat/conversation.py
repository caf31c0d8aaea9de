"""What a conversation is, once the wire's many forms are read away: roles and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `weight` 0 keeps an assistant turn in the prompt but out of the loss; None means 1."""

    role: Role
    content: str
    weight: int | None = None


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
            merged[-1] = Message(turn.role, f"{merged[-1].content}\n\n{turn.content}", turn.weight)
        else:
            merged.append(turn)
    if merged and merged[0].role != "user":
        raise RenderError(
            f"the template '{template}' needs the first message after the system message to come from the user, "
            f"not from the {merged[0].role}"
        )
    return merged
