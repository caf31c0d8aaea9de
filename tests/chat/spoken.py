"""Small templates that speak each form of tool calls, and replies written in those forms by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.chat.calls import CallReader
from gateway.chat.parse import Part
from gateway.chat.speech import Speech, ToolForm

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The tool {name}",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "where": {"type": "object"},
                    "tags": {"type": "array"},
                    "sure": {"type": "boolean"},
                    "none": {"type": "null"},
                },
            },
        },
    }
    for name in ("get_weather", "get", "find-it")
]
THINK = ("<think>", "</think>")


def write_call(form: ToolForm, name: str, arguments: dict[str, Any]) -> str:
    """One call as a model that was taught the form writes it; the forms' lists hold one call each."""
    text = json.dumps(arguments, ensure_ascii=False)
    match form:
        case "hermes":
            return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'
        case "xml":
            values = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
            parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
            return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
        case "llama3_json":
            return f'{{"name": "{name}", "parameters": {text}}}'
        case "mistral":
            return f'[TOOL_CALLS][{{"name": "{name}", "arguments": {text}, "id": "abcdefghi"}}]'
        case "mistral_args":
            return f"[TOOL_CALLS]{name}[ARGS]{text}"
        case "pythonic" | "pythonic_tagged":
            inside = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            call = f"[{name}({inside})]"
            return f"<|tool_call_start|>{call}<|tool_call_end|>" if form == "pythonic_tagged" else call
        case "functionary":
            return f">>>{name}\n{text}"
        case "functionary_tags":
            return f"<function={name}>{text}</function>"
        case "harmony":
            return f"<|channel|>commentary to=functions.{name} json<|message|>{text}<|call|>"


@dataclass
class Reply:
    """What a reader made of a reply."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Checks on the way that a call's id and name come once, with its first delta."""
        self.text += part.text
        self.reasoning += part.reasoning
        for call in part.calls:
            assert (call.id is None) == (call.name is None)
            assert (call.index == len(self.calls)) == (call.name is not None)
            if call.name is not None:
                self.calls.append((call.name, ""))
                self.ids.append(call.id or "")
            name, arguments = self.calls[call.index]
            self.calls[call.index] = (name, arguments + "".join(call.arguments))


def read_text(
    form: ToolForm | None,
    text: str,
    cuts: Sequence[int] = (),
    *,
    reasoning: tuple[str, str] | None = None,
    in_reasoning: bool = False,
    single: bool = False,
) -> Reply:
    """A reply's text read in the pieces that `cuts` make of it."""
    reader = CallReader(Speech(form, reasoning), TOOLS, {}, lambda: "id", in_reasoning=in_reasoning, single=single)
    reply, at = Reply(), 0
    for cut in [*sorted(cuts), len(text)]:
        reader.feed(text[at : max(at, cut)])
        at = max(at, cut)
        reply.add(drain(reader))
    reader.finish()
    reply.add(drain(reader))
    return reply


def drain(reader: CallReader) -> Part:
    part = Part("".join(reader.text), "".join(reader.reasoning), reader.calls)
    reader.text, reader.reasoning, reader.calls = [], [], []
    return part
