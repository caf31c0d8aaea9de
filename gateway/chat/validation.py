"""What a template must be able to do before anybody is rendered through it: tried out, not read off.

Place in the flow: registration → **validation**. One rule: each problem is a sentence for the person who brings the template.
"""

from __future__ import annotations

import time

from gateway.chat.conversation import Message, RenderError
from gateway.chat.frame import may_add, needed_tools, read_frame, shared_beginning, speech_of
from gateway.chat.templates import Template
from gateway.chat.tokenizer import Tokenizer

OUTPUT_LIMIT = 200_000  # characters that a conversation of a few words may take
TIME_LIMIT_S = 1.0
_USER, _REPLY, _AGAIN = "question alpha", "answer beta", "question gamma"


def validate(template: Template, tokenizer: Tokenizer | None = None, eos_ids: tuple[int, ...] = ()) -> list[str]:
    """What is wrong with a template, one sentence each; nothing where it can be used.

    With a model's `tokenizer` and `eos_ids` it is also tried whether something can stop a reply. May take `TIME_LIMIT_S` and a
    little more, so it is none of the event loop's work.
    """
    began = time.monotonic()
    try:
        problems = _try_out(template)
    except (RenderError, ValueError) as error:
        return [f"{error}"]
    if time.monotonic() - began > TIME_LIMIT_S:
        problems.append(f"it takes more than {TIME_LIMIT_S:g} s to write a conversation of a few words")
    if tokenizer is not None and not problems:
        problems += _try_with(template, tokenizer, eos_ids)
    return problems


def _try_out(template: Template) -> list[str]:
    asked = [Message("user", _USER)]
    tools = needed_tools(template, asked, {})
    prompt = template.text(asked, generate=True, tools=tools)
    whole = [*asked, Message("assistant", _REPLY), Message("user", _AGAIN)]
    later = template.text(whole, generate=True, tools=tools)
    said = template.text(whole[:2], generate=False, tools=tools)
    spoken = (
        ("user", _USER, prompt),
        ("assistant", _REPLY, later),
        ("assistant", _REPLY, said),
        ("user", _AGAIN, later),
    )
    problems = [f"it leaves out what the {role} says" for role, words, text in spoken if words not in text]
    longest = max(len(prompt), len(later))
    if longest > OUTPUT_LIMIT:
        problems.append(f"it writes {longest} characters for a conversation of a few words")
    if not problems and not _begins(template, prompt, said.partition(_REPLY)[0]):
        problems.append(
            "it does not write a reply where its prompt ends, so no prompt is the beginning of what comes of it"
        )
    return list(dict.fromkeys(problems))


def _begins(template: Template, prompt: str, head: str) -> bool:
    """A prompt may end with a reasoning block that the written turn lacks, and with nothing else that it lacks."""
    shared = shared_beginning(prompt, head)
    extra, lead = prompt[len(shared) :], head[len(shared) :]
    return not extra or may_add(template, extra, lead, speech_of(template).reasoning)


def _try_with(template: Template, tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> list[str]:
    controls, speech = tokenizer.controls_of(template.literal_text), speech_of(template)
    try:
        read_frame(template, tokenizer, controls, eos_ids, speech.reasoning, {})
    except ValueError as error:
        return [str(error)]
    return []
