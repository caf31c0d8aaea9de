"""Jinja chat templates, as models bring them: what they are given, and which form of it they want.

Place in the flow: registry, bundle → **jinja** → sandbox. One rule: the text is what transformers writes for the same template
and data; where real templates disagree about the data's form, a probe decides and not the template's name.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from gateway.chat.budget import Exceeded
from gateway.chat.conversation import Message, Options, RenderError, ToolCall, Tools
from gateway.chat.sandbox import literal_text, render

# What the renderer reads itself; all other options are variables of the template.
OWN_OPTIONS = frozenset({"date", "system"})
_TAKEN = frozenset({"messages", "tools", "add_generation_prompt"})
_PROBE_NAME, _PROBE_KEY, _PROBE_VALUE, _PROBE_ANSWER = "probe_name", "probe_key", "probe_value", "probe_answer"
_PROBE_CALL = ToolCall("call_0123456789abcdefABCDEFGH", _PROBE_NAME, json.dumps({_PROBE_KEY: _PROBE_VALUE}))
_PROBE_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _PROBE_NAME,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {_PROBE_KEY: {"type": "string", "description": "A key."}},
            "required": [_PROBE_KEY],
        },
    },
}


@dataclass(frozen=True)
class CallForm:
    """How a template wants a call: its arguments as an object or as text, an empty content absent, null or empty, its id as it
    was given, as nine letters and digits (Mistral's refuse others), or as "functions.NAME:N" (Kimi's write nothing else).
    """

    arguments: Literal["object", "text"] = "object"
    content: Literal["absent", "null", "empty"] = "absent"
    ids: Literal["given", "nine", "named"] = "given"


_FORMS = tuple(
    CallForm(arguments, content, ids)
    for ids in ("given", "nine", "named")
    for content in ("absent", "null", "empty")
    for arguments in ("object", "text")
)


@dataclass(frozen=True)
class JinjaTemplate:
    """A chat template, or several by name ("default", "tool_use").

    `tokens` are the names it may use (bos_token, …), `options` the render options that it comes with: "date" (YYYY-MM-DD, what
    `strftime_now` tells; today where absent), "system" (the system text of conversations that bring none), and variables.
    """

    name: str
    template: str | dict[str, str]
    tokens: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    kind = "jinja"
    adds_bos = False

    @property
    def stop(self) -> str:
        return self.tokens.get("eos_token", "")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.template,) if isinstance(self.template, str) else tuple(self.template.values())

    @cached_property
    def literal_text(self) -> str:
        """All that it may write of itself."""
        return "\0".join(literal_text(source) for source in self.sources)

    def text(
        self,
        messages: Sequence[Message],
        *,
        generate: bool,
        tools: Tools | None = None,
        options: Options | None = None,
        quick: bool = False,
    ) -> str:
        if tools and not self.offers_tools:
            raise RenderError(f"the template '{self.name}' cannot offer tools to the model")
        form = CallForm()
        for number, message in enumerate(messages):
            if message.tool_calls:
                form = self._form_for(number)
            elif message.role == "tool" and not self.takes_answers:
                raise RenderError(
                    f"messages[{number}] holds a tool's result, and the template '{self.name}' writes none"
                )
        return self._render(plain_messages(messages, form), generate, tools, options, quick)

    def source(self) -> dict[str, Any]:
        return {"name": self.name, "template": self.template, "tokens": self.tokens, "options": self.options}

    @cached_property
    def offers_tools(self) -> bool:
        """Whether tools come out in the prompt."""
        try:
            return _PROBE_NAME in self._render(plain_messages([Message("user", "?")]), True, [_PROBE_TOOL])
        except RenderError:
            return False

    @cached_property
    def call_form(self) -> CallForm | None:
        """The form of a call that comes out whole: name, and arguments as JSON or item by item. None where none does.

        Most templates write `arguments | tojson` or go through its items, and a text would come out as a quoted one. Some put
        the text in as it is, and would show an object as Python does. R1's write calls only of messages whose content is null.
        A form in which the call's result comes out too is taken before others: QwQ's look into the content of earlier calls.
        """
        found = None
        try:
            for form in _FORMS:
                if self._writes_call(form):
                    if self._writes_answer(form):
                        return form
                    found = found or form
        except RenderError:  # it ran out of its bounds: no use in trying the other forms
            return None
        return found

    @cached_property
    def takes_answers(self) -> bool:
        """Whether a tool's result comes out."""
        try:
            return self._writes_answer(self.call_form or CallForm())
        except RenderError:
            return False

    def _writes_answer(self, form: CallForm) -> bool:
        try:
            return _PROBE_ANSWER in self._probe_call(form, answered=True)
        except RenderError as error:
            if isinstance(error.__cause__, Exceeded):
                raise
            return False

    def _form_for(self, number: int) -> CallForm:
        if self.call_form is None:
            raise RenderError(f"messages[{number}] holds a tool call, and the template '{self.name}' writes none")
        return self.call_form

    def _writes_call(self, form: CallForm) -> bool:
        try:
            text = self._probe_call(form, answered=False)
        except RenderError as error:
            if isinstance(error.__cause__, Exceeded):
                raise
            return False
        call = text[text.rfind(_PROBE_NAME) :]  # after the tools, the call
        as_python, as_quoted = f"'{_PROBE_KEY}'", f'\\"{_PROBE_KEY}\\"'
        written = text.count(_PROBE_NAME) > self._offered_names and _PROBE_VALUE in text
        return written and as_python not in call and as_quoted not in call

    @cached_property
    def _offered_names(self) -> int:
        """How often the probe's name comes out when it is only offered."""
        try:
            return self._render(plain_messages([Message("user", "?")]), True, [_PROBE_TOOL]).count(_PROBE_NAME)
        except RenderError:
            return 0

    def _probe_call(self, form: CallForm, *, answered: bool) -> str:
        messages = [Message("user", "?"), Message("assistant", "", tool_calls=(_PROBE_CALL,))]
        if answered:
            messages.append(Message("tool", _PROBE_ANSWER, tool_call_id=_PROBE_CALL.id, name=_PROBE_NAME))
        return self._render(plain_messages(messages, form), answered, [_PROBE_TOOL] if self.offers_tools else None)

    def _render(
        self,
        messages: list[dict[str, Any]],
        generate: bool,
        tools: Tools | None = None,
        options: Options | None = None,
        quick: bool = False,
    ) -> str:
        given = {**self.options, **(options or {})}
        if given.get("system") and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": given["system"]}, *messages]
        variables = {name: value for name, value in given.items() if name not in OWN_OPTIONS}
        if taken := _TAKEN & variables.keys():
            raise RenderError(f"'{min(taken)}' cannot be a render option: it is what the template is asked to write")
        variables = {**self.tokens, **variables, "messages": messages, "add_generation_prompt": generate}
        variables["tools"] = [dict(tool) for tool in tools] if tools else None
        return render(self._chosen(bool(tools)), variables, _read_date(given.get("date")), quick)

    def _chosen(self, with_tools: bool) -> str:
        if isinstance(self.template, str):
            return self.template
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self.template:
                return self.template[name]
        raise RenderError(f"the template '{self.name}' has no 'default' among {', '.join(sorted(self.template))}")


def tokens_of(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The token names that a template may use, from a model's tokenizer_config.json."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    found = {name: tokenizer_config.get(name) for name in names}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def plain_messages(messages: Sequence[Message], form: CallForm | None = None) -> list[dict[str, Any]]:
    """Messages as chat templates know them, calls in the form that is wanted."""
    form = form or CallForm()
    ids: dict[str, str] = {}
    for message in messages:
        for call in message.tool_calls:
            ids[call.id] = _id(call, len(ids), form)
    return [_plain(message, form, ids) for message in messages]


def _plain(message: Message, form: CallForm, ids: Mapping[str, str]) -> dict[str, Any]:
    """A message as chat templates know it. What is absent has no key, as in transformers."""
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call, form, ids) for call in message.tool_calls]
        if not message.content and form.content == "absent":
            del plain["content"]
        elif not message.content and form.content == "null":
            plain["content"] = None
    if message.tool_call_id is not None:
        plain["tool_call_id"] = ids.get(message.tool_call_id, message.tool_call_id)
    if message.name is not None:
        plain["name"] = message.name
    if message.reasoning is not None:  # the second name is what gpt-oss reads
        plain["reasoning_content"] = plain["thinking"] = message.reasoning
    return plain


def _plain_call(call: ToolCall, form: CallForm, ids: Mapping[str, str]) -> dict[str, Any]:
    arguments: Any = call.arguments
    if form.arguments == "object":
        try:
            read = json.loads(call.arguments) if call.arguments else {}
        except (ValueError, RecursionError):
            read = None
        arguments = read if isinstance(read, dict) else call.arguments
    return {"id": ids[call.id], "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _id(call: ToolCall, number: int, form: CallForm) -> str:
    if form.ids == "named":
        return f"functions.{call.name}:{number}"
    if form.ids == "given" or _NINE.fullmatch(call.id):
        return call.id
    return hashlib.sha256(call.id.encode()).hexdigest()[:9]


_NINE = re.compile("[A-Za-z0-9]{9}")


def _read_date(date: Any) -> datetime.datetime | None:
    if date is None:
        return None
    try:
        return datetime.datetime.fromisoformat(str(date))
    except ValueError as error:
        raise RenderError(f"the render option 'date' is {str(date)[:40]!r}; write it as YYYY-MM-DD") from error
