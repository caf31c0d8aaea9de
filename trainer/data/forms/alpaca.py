"""Alpaca's form: instruction, input (often empty), output; as LLaMA-Factory has it, `system` and `history` too.

Alpaca's two prompts, with an input and without, are made by the model's own template, since that is what the tuned model will
be asked through: the user's turn is the instruction, and after a blank line the input. A template that writes instructions
under headings, as fastchat's `alpaca` does, is Alpaca's prompt itself; there the input gets its heading too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.chat.conversation import Message
from trainer.data.conversations import BadExample, Example, kind_of, read_optional, read_reply, read_said

INSTRUCTION_HEADING, _INPUT_HEADING = "### Instruction", "### Input: "


def read_instruction(line: Mapping[str, Any], headings: bool = False) -> list[Example]:
    """{"instruction", "input", "output"}; `headings`: the template writes instructions under a heading."""
    before, paths, remark = _asked(line, headings)
    reply = Message("assistant", read_said(line.get("output"), "output"))
    return [Example([*before, reply], paths=(*paths, "output"), remarks=(remark,))]


def read_preference(line: Mapping[str, Any], headings: bool = False) -> list[Example]:
    """{"instruction", "input", "chosen", "rejected"}."""
    before, paths, remark = _asked(line, headings)
    chosen, rejected = (read_reply(line.get(name), name, before) for name in ("chosen", "rejected"))
    return [Example([*before, chosen], paths=(*paths, "chosen"), rejected=rejected, remarks=(remark,))]


def _asked(line: Mapping[str, Any], headings: bool) -> tuple[list[Message], list[str], str]:
    """What comes before the reply, where it stands, and which of the two prompts it is."""
    messages, paths = [], []
    if system := read_optional(line.get("system"), "system"):
        messages, paths = [Message("system", system)], ["system"]
    history = line.get("history") or []
    if not isinstance(history, list):
        raise BadExample(f"is {kind_of(history)}; it must be a list of pairs [instruction, output]", "history")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadExample("must be a pair [instruction, output]", f"history[{number}]")
        for place, role in ((0, "user"), (1, "assistant")):
            where = f"history[{number}][{place}]"
            messages.append(Message(role, read_said(pair[place], where)))  # type: ignore[arg-type]
            paths.append(where)
    asked, given = read_said(line.get("instruction"), "instruction"), read_optional(line.get("input"), "input")
    if given:
        asked = f"{asked}\n\n{_INPUT_HEADING if headings else ''}{given}"
    messages.append(Message("user", asked))
    return messages, [*paths, "instruction"], "with an input" if given else "without an input"
