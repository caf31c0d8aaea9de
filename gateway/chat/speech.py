"""How a template's model speaks: the way it writes tool calls and reasoning down, read off the template's text.

Place in the flow: bundle → **speech** → parse (reads replies by it) and inference (opens a forced call with it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ToolForm = Literal[
    "hermes",  # <tool_call>{"name": …, "arguments": …}</tool_call>
    "xml",  # <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
    "llama3_json",  # {"name": …, "parameters": …}, also after <|python_tag|>
    "mistral",  # [TOOL_CALLS][{"name": …, "arguments": …}]
    "mistral_args",  # [TOOL_CALLS]name[ARGS]{…}
    "pythonic",  # [name(key="value"), other()]
    "pythonic_tagged",  # the same between <|tool_call_start|> and <|tool_call_end|>
    "functionary",  # >>>name\n{…}, text after >>>all\n; the prompt ends with the first >>>
    "functionary_tags",  # <function=name>{…}</function>
    "harmony",  # <|channel|>commentary to=functions.name<|message|>{…}<|call|>; reasoning in a channel of its own
]

_THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<reasoning>", "</reasoning>"),
    ("<thinking>", "</thinking>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
_HARMONY_REASONING = ("<|channel|>analysis<|message|>", "<|end|>")
_LLAMA_3_CALL = re.compile(r'\{"name": (?:function name|"\s*\'?).{0,400}?"parameters": ', re.DOTALL)
_HERMES_CALL = re.compile(r"""<tool_call>[\s\\n'"{}\-]*\{\\?['"]?\s*\\?["']name""")
_LFM_2 = ("<|tool_list_start|>", "<|tool_call_start|>", '"List of tools: ["')
_PYTHONIC_CALL = re.compile(r"\[\s*func(?:tion)?_?name\d?\(\s*param")


@dataclass(frozen=True, slots=True)
class Speech:
    """`reasoning` is what opens and closes it; None where the template knows none."""

    tool_calls: ToolForm | None = None
    reasoning: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request lets the model call. `forced`: the reply must begin with a call of one of these names."""

    tools: tuple[Mapping[str, Any], ...] = ()
    forced: tuple[str, ...] = ()
    single: bool = False  # one call at most, the reply ends with it


NO_TOOLS = ToolUse()


def read_speech(template: str) -> Speech:
    """The way that a Jinja template's text speaks of. Calls in a form that is not read here count as none."""
    if "<|channel|>" in template and "<|message|>" in template:
        return Speech("harmony", _HARMONY_REASONING)
    reasoning = next((pair for pair in _THINKING if pair[0] in template or pair[1] in template), None)
    return Speech(_tool_form(template), reasoning)


def opens_reasoning(speech: Speech, prompt: str) -> bool:
    """Whether a prompt's text ends inside the reasoning, as those of R1's kin do."""
    return speech.reasoning is not None and prompt.rstrip().endswith(speech.reasoning[0])


def offered(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as a template shows it to the model: `strict` is a word to the server, and what is null is not there."""
    function = {key: value for key, value in tool["function"].items() if key != "strict" and value is not None}
    return {"type": "function", "function": function}


def call_opening(speech: Speech, names: Sequence[str], *, in_reasoning: bool = False, lead: str = "") -> str:
    """What a reply that must be a call begins with: up to the arguments for one name, up to the name for several.

    It goes into the prompt, so that the model can only go on from there. Reasoning that the prompt has opened is closed
    first (`in_reasoning`); what the template puts before a reply (`lead`), an empty reasoning or a space, comes before it.
    Nothing makes the model finish what is begun: its arguments may still be no JSON, its name none of `names`.
    """
    before = ""
    if speech.reasoning is not None:
        before = f"\n{speech.reasoning[1]}\n\n" if in_reasoning else lead if speech.reasoning[1] in lead else ""
    if lead.isspace():
        before = lead
    name = names[0] if len(names) == 1 else None
    return before + _opening(speech.tool_calls, name)


def opens_json(speech: Speech) -> bool:
    """Whether what follows the opening of a call of one function is its arguments as one JSON object."""
    return speech.tool_calls not in (None, "xml", "pythonic", "pythonic_tagged")


def text_opening(speech: Speech, *, in_reasoning: bool) -> str:
    """What a reply that must be text throughout begins with: what names its channel, the end of a reasoning that is open."""
    if speech.tool_calls == "harmony":
        return "<|channel|>final<|message|>"
    if speech.tool_calls == "functionary":
        return "all\n"
    if speech.reasoning is not None and in_reasoning:
        return f"\n{speech.reasoning[1]}\n\n"
    return ""


def _tool_form(template: str) -> ToolForm | None:
    if "[TOOL_CALLS]" in template:
        return "mistral_args" if "[ARGS]" in template else "mistral"
    if ">>>all" in template or ">>>${recipient}" in template:
        return "functionary"
    if "<tool_call>" in template and "<function=" in template and "<parameter=" in template:
        return "xml"
    if "<function=" in template and "<parameter=" not in template and "</function>" in template:
        return "functionary_tags"
    if _HERMES_CALL.search(template):
        return "hermes"
    if any(mark in template for mark in _LFM_2):
        return "pythonic_tagged"
    if _PYTHONIC_CALL.search(template):
        return "pythonic"
    if _LLAMA_3_CALL.search(template) and "<|START_ACTION|>" not in template:
        return "llama3_json"
    return None


def _opening(form: ToolForm | None, name: str | None) -> str:
    """Spaces that a tokenizer joins to the next word are left to the model."""
    match form:
        case "hermes":
            return '<tool_call>\n{"name": "' + (f'{name}", "arguments":' if name else "")
        case "xml":
            return f"<tool_call>\n<function={name}>\n" if name else "<tool_call>\n<function="
        case "llama3_json":
            return '{"name": "' + (f'{name}", "parameters":' if name else "")
        case "mistral":
            return '[TOOL_CALLS][{"name": "' + (f'{name}", "arguments":' if name else "")
        case "mistral_args":
            return "[TOOL_CALLS]" + (f"{name}[ARGS]" if name else "")
        case "pythonic" | "pythonic_tagged":
            return ("<|tool_call_start|>[" if form == "pythonic_tagged" else "[") + (f"{name}(" if name else "")
        case "functionary":
            return f"{name}\n" if name else ""
        case "functionary_tags":
            return f"<function={name}>" if name else "<function="
        case "harmony":
            return " to=functions." + (f"{name}<|channel|>commentary json<|message|>" if name else "")
    return ""
