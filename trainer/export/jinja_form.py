"""A template as Hugging Face's and llama.cpp's programs read one: a Jinja chat template.

Place in the flow: written into what is exported, beside template.json, which our own renderer prefers. One rule: a form that
is not a template's own is only given away once it has written sample conversations letter for letter as the template does.
"""

from __future__ import annotations

import json

from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message, RenderError
from gateway.chat.jinja import JinjaTemplate
from gateway.chat.templates import Template

# What stands in for the words of a conversation, to see what a template writes around them.
_SYSTEM, _USER, _REPLY, _AGAIN = "\ue010", "\ue011", "\ue012", "\ue013"
_SAMPLES = (
    [Message("user", "Hello?")],
    [Message("user", " What\nis this? "), Message("assistant", "A  sample.\n"), Message("user", "Why?")],
    [Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
    [Message("user", "1"), Message("assistant", "2"), Message("user", "3"), Message("assistant", "4")],
)


def jinja_form(bundle: Bundle) -> str | dict[str, str] | None:
    """The text of a chat template, or several by name; None where the template cannot be said in Jinja."""
    template = bundle.template
    if isinstance(template, JinjaTemplate):
        return template.template
    bos = _bos(bundle)
    try:
        text = _turn_by_turn(template, bos)
        made = JinjaTemplate(template.name, text)
        alike = all(_is_alike(bundle, bos, made, sample) for sample in _SAMPLES)
    except (RenderError, ValueError):
        return None
    return text if alike else None


def _is_alike(bundle: Bundle, bos: str, made: JinjaTemplate, sample: list[Message]) -> bool:
    """Whether both write a conversation alike, in letters and in ids."""
    encode, generate = bundle.tokenizer.encode, sample[-1].role == "user"
    own = bundle.template.text(sample, generate=generate)
    text = made.text(sample, generate=generate)
    before = bundle.tokenizer.prefix_ids if bos else []
    return text == bos + own and encode(text) == before + encode(own)


def _turn_by_turn(template: Template, bos: str) -> str:
    """A template that writes user and assistant in turn, each between texts of its own. ValueError where it is no such."""

    def write(*messages: Message, generate: bool = False) -> str:
        return template.text(list(messages), generate=generate)

    user, reply, again = Message("user", _USER), Message("assistant", _REPLY), Message("user", _AGAIN)
    begin, after_user = _cut(write(user), _USER)
    asking = _cut(write(user, generate=True), _USER)[1]
    whole = _cut(write(user, reply, again), _USER)[1]
    before_reply, between = _cut(whole, _REPLY)
    between = _cut(between, _AGAIN)[0]
    end = _cut(write(user, reply), _REPLY)[1]
    begin_with_system, rest = _cut(write(Message("system", _SYSTEM), user), _SYSTEM)
    after_system = _cut(rest, _USER)[0]
    if not asking.startswith(after_user) or not before_reply.startswith(after_user):
        raise ValueError("what ends a user's turn depends on what comes next")
    cue, opening = asking[len(after_user) :], before_reply[len(after_user) :]
    trim = "" if f" {_USER} " in write(Message("user", f" {_USER} ")) else " | trim"
    return "".join(
        (
            "{%- if messages[0]['role'] == 'system' -%}",
            _said(bos + begin_with_system) + "{{- messages[0]['content']" + trim + " -}}" + _said(after_system),
            "{%- set turns = messages[1:] -%}{%- else -%}",
            _said(bos + begin),
            "{%- set turns = messages -%}{%- endif -%}",
            "{%- for message in turns -%}{%- if message['role'] == 'user' -%}",
            "{%- if not loop.first -%}" + _said(between) + "{%- endif -%}",
            "{{- message['content']" + trim + " -}}" + _said(after_user),
            "{%- else -%}",
            _said(opening) + "{{- message['content']" + trim + " -}}",
            "{%- if loop.last -%}" + _said(end) + "{%- endif -%}{%- endif -%}{%- endfor -%}",
            "{%- if add_generation_prompt -%}" + _said(cue) + "{%- endif -%}",
        )
    )


def _bos(bundle: Bundle) -> str:
    """What the tokenizer puts before a text by itself, which a chat template has to write out."""
    if not bundle.template.adds_bos:
        return ""
    names = [bundle.tokenizer.name_of(token) for token in bundle.tokenizer.prefix_ids]
    return "".join(name for name in names if name)


def _said(text: str) -> str:
    return "{{- " + json.dumps(text, ensure_ascii=False) + " -}}" if text else ""


def _cut(text: str, at: str) -> tuple[str, str]:
    before, found, after = text.partition(at)
    if not found or at in after:
        raise ValueError("a message does not come out once")
    return before, after
