"""A reply's text → reasoning, text and tool calls, as it comes.

Place in the flow: parse → **calls** → json_forms, own_forms → cursor. One rule: a call is told as soon as its name is one of
the tools' and its arguments begin, and from then on it stays a call, whole or not; whatever comes to nothing before that is
text again, to the last character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.chat import json_forms, own_forms
from gateway.chat.cursor import FIRST_CONTROL, Cursor, Waiting
from gateway.chat.speech import Speech, ToolForm

_CONTROL = re.compile("[\ud800-\udfff]")
# What each form is marked by. Those that a tokenizer knows as control tokens count only as such.
_MARKS: dict[ToolForm, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "xml": ("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"),
    "llama3_json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "mistral_args": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "pythonic": (),
    "pythonic_tagged": ("<|tool_call_start|>", "<|tool_call_end|>"),
    "functionary": (">>>",),
    "functionary_tags": ("<function=", "</function>"),
    "harmony": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"),
}
_FORMS: dict[ToolForm, Callable[[CallReader], Waiting[None]]] = {
    "hermes": json_forms.hermes,
    "xml": own_forms.xml,
    "llama3_json": json_forms.llama_3,
    "mistral": json_forms.mistral,
    "mistral_args": json_forms.mistral,
    "pythonic": own_forms.pythonic,
    "pythonic_tagged": own_forms.pythonic,
    "functionary": json_forms.functionary,
    "functionary_tags": json_forms.functionary_tags,
    "harmony": own_forms.harmony,
}


@dataclass(slots=True)
class CallDelta:
    """More of a tool call. `id` and `name` come with the first delta of each call only."""

    index: int
    id: str | None
    name: str | None
    arguments: list[str] = field(default_factory=list)


class _Enough(Exception):
    """The one call that was asked for is complete."""


class CallReader:
    """Reads one reply. Text goes in at `feed`; `text`, `reasoning` and `calls` collect what it turned out to be."""

    def __init__(
        self,
        speech: Speech,
        tools: Sequence[Mapping[str, Any]],
        controls: Mapping[str, int],
        call_id: Callable[[], str],
        *,
        in_reasoning: bool,
        single: bool,
    ) -> None:
        """`controls` are the control tokens by name; `single` ends the reply after its first call (`enough`)."""
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[CallDelta] = []
        self.count = 0  # of calls so far
        self.reasons = in_reasoning
        self.enough = False
        self.speech, self._call_id, self._single = speech, call_id, single
        self.functions = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.names = tuple(self.functions)
        self.cursor = Cursor()
        self.space: list[str] = []  # after text: shown only if more text comes
        self._after_call = False
        calls = speech.tool_calls is not None and (tools or speech.tool_calls == "harmony")
        used = [*(_MARKS[speech.tool_calls] if calls else ()), *(speech.reasoning or ())]  # type: ignore[index]
        named = sorted({name for name in controls if any(name in mark for mark in used)}, key=len, reverse=True)
        self._spelled = {name: chr(FIRST_CONTROL + number) for number, name in enumerate(named)}
        self._written = {ord(char): name for name, char in self._spelled.items()}
        self.controls = {controls[name]: char for name, char in self._spelled.items()}
        self._machine: Waiting[None] | None = self._read()
        self._step()

    def feed(self, text: str) -> None:
        """Reads on. Control tokens stand in `text` as `controls` spells them."""
        if self._machine is not None:
            self.cursor.add(text)
            self._step()
        elif not self.enough:
            self.text.append(self.plain(text))

    def finish(self) -> None:
        """The reply is over: what was open is decided."""
        self.cursor.ended = True
        if self._machine is not None:
            self._step()

    @property
    def waiting(self) -> int:
        """How many characters wait to be looked at again."""
        return self.cursor.waiting

    def _step(self) -> None:
        assert self._machine is not None
        try:
            next(self._machine)
        except StopIteration:
            self._machine = None
        except _Enough:
            self._machine, self.enough = None, True

    def _read(self) -> Waiting[None]:
        form = self.speech.tool_calls
        if self.speech.reasoning is not None and form != "harmony":  # whose reasoning is a channel among others
            yield from self._thoughts(*map(self.spell, self.speech.reasoning))
        if form is not None and (self.names or form == "harmony"):
            yield from _FORMS[form](self)
        if (yield from self.cursor.char()) or not self._after_call:
            self.text += self.space
        self.text.append(self.plain(self.cursor.rest()))

    # what the forms tell

    def tell(self, piece: str) -> None:
        body = piece.rstrip()
        if body:
            self.text += [*self.space, self.plain(body)]
            self.space.clear()
            self._after_call = False
        if len(body) < len(piece):
            self.space.append(piece[len(body) :])

    def think(self, piece: str) -> None:
        body = piece.rstrip("\n")
        if body:
            self.reasoning += [*self.space, self.plain(body)]
            self.space.clear()
        if len(body) < len(piece):
            self.space.append(piece[len(body) :])

    def give_up(self) -> None:
        """What was held is no call: text again."""
        for piece in self.cursor.held:
            self.tell(piece)
        self.cursor.held.clear()

    def begin(self, name: str) -> None:
        """A call it is: told with its id and name. The space before it belonged to it."""
        self.cursor.held.clear()
        self.space.clear()
        self.calls.append(CallDelta(self.count, self._call_id(), name))
        self.count += 1

    def argue(self, piece: str) -> None:
        index = self.count - 1
        if not self.calls or self.calls[-1].index != index:
            self.calls.append(CallDelta(index, None, None))
        self.calls[-1].arguments.append(self.plain(piece))

    def end(self) -> None:
        """The arguments are complete."""
        self.cursor.held.clear()
        self._after_call = True
        if self._single:
            raise _Enough

    def plain(self, text: str) -> str:
        return text.translate(self._written) if self._written and _CONTROL.search(text) else text

    def spell(self, mark: str) -> str:
        """A marker as it stands in the text: its control tokens as single characters."""
        for name, char in self._spelled.items():
            mark = mark.replace(name, char)
        return mark

    def _thoughts(self, opening: str, closing: str) -> Waiting[None]:
        cursor = self.cursor
        yield from cursor.space()
        closed = opened = yield from cursor.literal(opening, closing)
        if not opened and not self.reasons:
            self.give_up()
            return
        cursor.held.clear()
        if closed != closing:
            self.reasons = True
            yield from cursor.newlines()
            cursor.held.clear()
            closed = yield from cursor.until((closing,), self.think)
        self.reasons = False
        self.space.clear()
        if closed:
            yield from cursor.newlines()
        cursor.held.clear()
