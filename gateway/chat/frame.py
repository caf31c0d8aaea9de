"""What a template puts around a reply, read off it by rendering probes: nothing is known of it by its name.

Place in the flow: bundle → **frame** → render (which writes training replies by it) and parse (which takes it off again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.chat.conversation import Message, RenderError, ToolCall, Tools
from gateway.chat.speech import Speech, read_speech
from gateway.chat.templates import Template
from gateway.chat.tokenizer import Controls, Tokenizer

PROBE = "\ufdd3"
_PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe", "description": "A probe.", "parameters": {"type": "object", "properties": {}}},
}
_PROBE_CALL = ToolCall("call_probe", "probe", f'{{"probe": "{PROBE}"}}')


@dataclass(frozen=True)
class ReplyFrame:
    """`lead` comes before a reply, `tail` between it and the stop, as the template writes a turn.

    `extra` is what a prompt has at its end and a written turn may lack (a reasoning block, opened or empty); `rest` all that
    the template writes after a turn that is the last.
    """

    lead: str
    tail: str
    stop: str
    stop_id: int | None  # None: the tokenizer has no such token, the stop is text
    extra: str = ""
    rest: str = ""
    other_stop_ids: tuple[int, ...] = ()  # after a tool call; what fastchat stops at
    writes_reasoning: bool = False  # an assistant's reasoning comes out, or an empty block where it would stand


def read_frame(
    template: Template,
    tokenizer: Tokenizer,
    controls: Controls,
    eos_ids: Sequence[int],
    reasoning: tuple[str, str] | None,
    options: Mapping[str, Any],
) -> ReplyFrame:
    """Raises ValueError when the template does not write replies where its prompts end, or nothing could stop one."""
    asked = [Message("user", "?")]
    tools = needed_tools(template, asked, options)
    prompt = template.text(asked, generate=True, tools=tools, options=options)
    said = [*asked, Message("assistant", PROBE)]
    whole = template.text(said, generate=False, tools=tools, options=options)
    head, probe, rest = whole.partition(PROBE)
    if not probe:
        raise ValueError(f"the template '{template.name}' leaves out what the assistant says")
    shared = shared_beginning(prompt, head)
    extra, lead = prompt[len(shared) :], head[len(shared) :]
    if extra and not may_add(template, extra, lead, reasoning):
        raise ValueError(f"the template '{template.name}' does not write a reply where its prompt ends")
    tail, stop, stop_id = _stop(
        template, tokenizer, controls, eos_ids, rest, _rest_between(template, said, tools, options)
    )
    if controls.find(tail) and (words := _without(tail, controls).strip()):
        raise ValueError(
            f"the template '{template.name}' writes {words!r} between control tokens after a reply; such a reply cannot be "
            "told from its frame"
        )
    others = _other_stops(template, tokenizer, controls, eos_ids, options)
    others = [i for i in others if i != stop_id]
    thinks = reasoning is not None and _writes_reasoning(template, reasoning, f"{extra}{lead}", tools, options)
    return ReplyFrame(lead, tail, stop, stop_id, extra, rest, tuple(others), thinks)


def speech_of(template: Template) -> Speech:
    """How the template's model writes calls and reasoning, as far as its text tells."""
    return read_speech("\n".join(getattr(template, "sources", ())))


def needed_tools(template: Template, asked: list[Message], options: Mapping[str, Any]) -> Tools | None:
    """None but for templates made for tools alone, which fail without."""
    try:
        template.text(asked, generate=True, options=options)
    except RenderError as error:
        try:
            template.text(asked, generate=True, tools=[_PROBE_TOOL], options=options)
        except RenderError:
            raise error from None
        return [_PROBE_TOOL]
    return None


def shared_beginning(prompt: str, head: str) -> str:
    """What both begin with, not cut within a token's name."""
    ends = (n for n, (a, b) in enumerate(zip(prompt, head, strict=False)) if a != b)
    shared = prompt[: next(ends, min(len(prompt), len(head)))]
    if len(shared) < min(len(prompt), len(head)):
        opened = max(shared.rfind("<"), shared.rfind("["))
        if opened >= 0 and not set(shared[opened:]) & set(">] \n"):
            shared = shared[:opened]
    return shared


def may_add(template: Template, extra: str, lead: str, reasoning: tuple[str, str] | None) -> bool:
    """Whether what a prompt adds can stand before a reply: reasoning, or plain words that the template leaves out later."""
    if template.kind != "jinja":
        return False
    return not lead or extra.isspace() or (reasoning is not None and extra.startswith(reasoning[0]))


def _writes_reasoning(
    template: Template, reasoning: tuple[str, str], before_reply: str, tools: Tools | None, options: Mapping[str, Any]
) -> bool:
    if reasoning[0] in before_reply:
        return True
    thought = f"{PROBE}{PROBE}"
    said = [Message("user", "?"), Message("assistant", PROBE, reasoning=thought)]
    try:
        return thought in template.text(said, generate=False, tools=tools, options=options)
    except RenderError:
        return False


def _rest_between(
    template: Template, said: list[Message], tools: Tools | None, options: Mapping[str, Any]
) -> str | None:
    """What comes after a reply when the user speaks again."""
    again = Message("user", f"{PROBE}{PROBE}")
    try:
        text = template.text([*said, again], generate=False, tools=tools, options=options)
    except RenderError:
        return None
    after = text.partition(PROBE)[2]
    return after.partition(PROBE)[0] if after.count(PROBE) == 2 else None


def _stop(
    template: Template,
    tokenizer: Tokenizer,
    controls: Controls,
    eos_ids: Sequence[int],
    rest: str,
    between: str | None,
) -> tuple[str, str, int | None]:
    """(tail, stop, its id or None): a control token after the reply, else the template's word for it, else EOS."""
    found = controls.find(rest)
    ends = [n for n, (name, _) in enumerate(found) if tokenizer.id_of(name) in eos_ids]
    if found:
        chosen = ends[0] if ends else _last_of_turn(found, between)
        if ends and chosen and between is not None and found[chosen][0] not in between:
            # An end of text that only the last turn has: what ends every turn is before it.
            turn_ends = [n for n in range(chosen) if found[n][0] in between]
            chosen = turn_ends[-1] if turn_ends else chosen
        name, at = found[chosen]
        return rest[:at], name, tokenizer.id_of(name)
    for word in (template.stop, *getattr(template, "turn_ends", ())):
        if word and word in rest and tokenizer.can_say(word):
            return rest.partition(word)[0], word, tokenizer.id_of(word)
    in_next = controls.find(between or "")
    if in_next and tokenizer.id_of(in_next[0][0]) in eos_ids:  # the next turn's first word, as with GLM
        name, at = in_next[0]
        return (between or "")[:at], name, tokenizer.id_of(name)
    for text in getattr(template, "stop_strings", ()):
        if between and text in between and tokenizer.id_of(text) is None and tokenizer.can_say(text):
            return between.partition(text)[0], text, None
    for end in eos_ids:  # the template has no word for it: the model's own end is trained and waited for
        name_of_end = tokenizer.name_of(end)
        if name_of_end is not None:
            return "", name_of_end, end
    raise ValueError(
        f"the template '{template.name}' puts nothing after a reply that could stop it, and the model names no end of text"
    )


def _without(text: str, controls: Controls) -> str:
    for name, _ in controls.find(text):
        text = text.replace(name, "")
    return text


def _last_of_turn(found: list[tuple[str, int]], between: str | None) -> int:
    """The model's own ends are none of these: the first, or the last of those that come in a row before the next turn."""
    return 0 if between is None else next((n for n, (name, _) in enumerate(found) if name in between), 0)


def _other_stops(
    template: Template,
    tokenizer: Tokenizer,
    controls: Controls,
    eos_ids: Sequence[int],
    options: Mapping[str, Any],
) -> list[int]:
    stops = [i for i in getattr(template, "stop_token_ids", ()) if i in tokenizer.control_id_set]
    stops += [i for text in getattr(template, "stop_strings", ()) if (i := tokenizer.id_of(text)) is not None]
    if getattr(template, "call_form", None) is None:
        return stops
    called = [Message("user", "?"), Message("assistant", "", tool_calls=(_PROBE_CALL,))]
    try:
        text = template.text(called, generate=False, tools=[_PROBE_TOOL], options=options)
    except RenderError:
        return stops
    found = [tokenizer.id_of(name) for name, _ in controls.find(text.rpartition(PROBE)[2])]
    return stops + [i for i in found if i is not None and i in eos_ids][:1]
