"""The forms that training data comes in: which one a line has, and how it is read.

Place in the flow: jsonl → **forms** → dataset. Pure. One rule: a file has one form, told by the keys of its first line, and
every other line is held to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.jobdir import Method
from trainer.data.conversations import BadExample, Example, kind_of, shown
from trainer.data.forms import alpaca, openai, sharegpt, trl

SUPERVISED: tuple[Method, ...] = ("supervised",)
PREFERENCE: tuple[Method, ...] = ("dpo", "orpo", "kto")  # for kto each pair is two examples
JUDGED: tuple[Method, ...] = ("kto",)


@dataclass(frozen=True)
class Form:
    """`read` gives the conversations of one line, or raises BadExample; `headings`: see alpaca."""

    name: str  # in words
    keys: str
    methods: tuple[Method, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], bool], list[Example]]
    splits: bool = False  # conversations that are too long are cut at the borders of turns


# In the order of trial: what has more keys comes first.
FORMS = (
    Form(
        "OpenAI's preference form",
        "input, preferred_output, non_preferred_output",
        PREFERENCE,
        lambda line: "preferred_output" in line or "non_preferred_output" in line,
        openai.read_preference,
    ),
    Form(
        "ShareGPT's preference form",
        "conversations, chosen, rejected",
        PREFERENCE,
        lambda line: "conversations" in line and ("chosen" in line or "rejected" in line),
        sharegpt.read_preference,
    ),
    Form(
        "ShareGPT's form",
        "conversations",
        SUPERVISED,
        lambda line: "conversations" in line,
        sharegpt.read_conversation,
        splits=True,
    ),
    Form(
        "Alpaca's preference form",
        "instruction, input, chosen, rejected",
        PREFERENCE,
        lambda line: "instruction" in line and ("chosen" in line or "rejected" in line),
        alpaca.read_preference,
    ),
    Form(
        "Alpaca's form",
        "instruction, input, output",
        SUPERVISED,
        lambda line: "instruction" in line and "messages" not in line,
        alpaca.read_instruction,
    ),
    Form(
        "TRL's preference form",
        "prompt, chosen, rejected",
        PREFERENCE,
        lambda line: "chosen" in line or "rejected" in line,
        trl.read_preference,
    ),
    Form(
        "KTO's form",
        "prompt or messages, completion, label",
        JUDGED,
        lambda line: isinstance(line.get("label"), bool) and ("completion" in line or "messages" in line),
        trl.read_judged,
    ),
    Form(
        "the prompt and completion form",
        "prompt, completion",
        SUPERVISED,
        lambda line: "completion" in line and "messages" not in line,
        trl.read_completion,
    ),
    Form("OpenAI's messages form", "messages", SUPERVISED, lambda line: "messages" in line, openai.read_messages),
)


def form_of(value: Any) -> Form | None:
    """The form that a line's keys tell; None where they tell none."""
    return next((form for form in FORMS if form.fits(value)), None) if isinstance(value, dict) else None


def unknown_form(value: Any) -> BadExample:
    """What to say of a line in no form."""
    if not isinstance(value, dict):
        return BadExample(f"is {kind_of(value)}; it must be a JSON object with a list 'messages'")
    keys = ", ".join(shown(key) for key in list(value)[:8]) or "none"
    known = "; ".join(form.keys for form in FORMS)
    return BadExample(f"has no 'messages' (its keys are {keys}), nor those of another form: {known}")


def fitting_forms(method: Method) -> str:
    """The forms that a method trains on, in words."""
    return "; or ".join(f"{form.keys} ({form.name})" for form in FORMS if method in form.methods)
