"""Ids → what a reply says, as they come: detokenised, cut at stop strings, without what the template puts around it.

Reasoning and tool calls are told from text where the template knows them (`calls.py`); a plain reply takes a shorter way.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from gateway.chat.bundle import Bundle
from gateway.chat.calls import CallDelta, CallReader
from gateway.chat.speech import NO_TOOLS, ToolUse


class Part:
    """What some ids said. `calls` are more of the tool calls, at most one entry for each."""

    __slots__ = ("calls", "reasoning", "text")

    def __init__(self, text: str, reasoning: str = "", calls: Sequence[CallDelta] = ()) -> None:
        self.text = text
        self.reasoning = reasoning
        self.calls = calls

    def add(self, more: Part) -> None:
        """What came after it."""
        self.text += more.text
        self.reasoning += more.reasoning
        calls = list(self.calls)
        for call in more.calls:
            if calls and calls[-1].index == call.index:
                calls[-1].arguments += call.arguments
            else:
                calls.append(call)
        self.calls = calls


class ReplyReader:
    """Reads one reply. The parts that it returns add up to the same however the ids were split."""

    __slots__ = (
        "_bytes",
        "_calls",
        "_control",
        "_cuts",
        "_decode",
        "_held",
        "_lead",
        "_stops",
        "_tail",
        "reasoning_tokens",
        "stopped",
    )

    def __init__(
        self,
        bundle: Bundle,
        stops: Sequence[str] = (),
        *,
        raw: bool = False,
        tool_use: ToolUse = NO_TOOLS,
        opens_reasoning: bool = False,
        begun: Sequence[int] = (),
    ) -> None:
        """`stops` are the client's stop strings. `raw` is for plain completions: nothing of a template is looked for.

        Calls are looked for where there are tools. `begun` are ids of the prompt that count as the reply's first.
        """
        tokenizer, speech = bundle.tokenizer, bundle.speech
        self._control = bundle.silent_ids
        self._bytes = tokenizer.token_bytes
        self._decode = tokenizer.incremental_decoder().decode
        self._lead = "" if raw else _lead_of_text(bundle)
        self._tail = "" if raw else _without_controls(bundle, bundle.frame.tail)
        self._stops = tuple(stops) if raw else (*stops, *bundle.stop_strings)
        self._cuts = bool(self._stops or self._tail)
        self._held = ""
        self._calls: CallReader | None = None
        self.reasoning_tokens = 0
        self.stopped = False  # a stop string was met: nothing more is read, the engine may be told to stop
        if not raw and (tool_use.tools or speech.reasoning is not None):
            if speech.tool_calls in ("functionary", "harmony"):
                self._lead = ""  # its reader knows it
            self._calls = CallReader(
                speech,
                tool_use.tools,
                {name: tokenizer.added_ids[name] for name in bundle.controls.names},
                _short_id if speech.tool_calls in ("mistral", "mistral_args") else _call_id,
                in_reasoning=opens_reasoning,
                single=tool_use.single,
            )
            for token_id in begun:
                self._calls.feed(self._calls.controls.get(token_id) or self._decode(self._bytes(token_id)))

    @property
    def plain(self) -> bool:
        """Whether all that it gives is text."""
        return self._calls is None

    @property
    def n_calls(self) -> int:
        """How many tool calls there have been."""
        return 0 if self._calls is None else self._calls.count

    def feed(self, ids: Iterable[int]) -> Part:
        """What can be told by now; control tokens are not text."""
        if self._calls is not None:
            return self._feed_calls(self._calls, ids)
        if self.stopped:
            return Part("")
        control, token_bytes = self._control, self._bytes
        text = self._decode(b"".join([token_bytes(token_id) for token_id in ids if token_id not in control]))
        if self._lead and text:
            text = self._strip_lead(text)
        return Part(self._release(text) if self._cuts else text)

    def finish(self, *, at_stop: bool) -> Part:
        """What was held back: all of it, but for the template's tail when the reply ended at its stop."""
        held = "" if self.stopped else self._held + self._decode(b"", True)
        self._held = ""
        if at_stop and self._tail:
            held = held.removesuffix(self._tail)
        if self._calls is None:
            return Part(held)
        self._calls.feed(held)
        self._calls.finish()
        return _part(self._calls)

    def _feed_calls(self, calls: CallReader, ids: Iterable[int]) -> Part:
        """One id after another: reasoning tokens are counted, and markers stand where they were written."""
        for token_id in ids:
            if self.stopped:
                break
            reasons = calls.reasons
            marker = calls.controls.get(token_id)
            if marker is not None:
                text, self._held, self._lead = self._held + self._decode(b"", True) + marker, "", ""
            elif token_id in self._control:
                text = ""
            else:
                text = self._decode(self._bytes(token_id))
                if self._lead and text:
                    text = self._strip_lead(text)
                if self._cuts:
                    text = self._release(text)
            if text:
                calls.feed(text)
            self.reasoning_tokens += reasons or calls.reasons
            self.stopped = self.stopped or calls.enough
        return _part(calls)

    def _strip_lead(self, text: str) -> str:
        shown = self._held + text
        if len(shown) < len(self._lead) and self._lead.startswith(shown):
            self._held = shown
            return ""
        self._held, lead, self._lead = "", self._lead, ""
        return shown.removeprefix(lead)

    def _release(self, text: str) -> str:
        text = self._held + text
        cut = min((at for at in (text.find(stop) for stop in self._stops) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._held = True, ""
            return text[:cut].removesuffix(self._tail) if self._tail else text[:cut]
        keep = self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _overlap(self, text: str) -> int:
        """How many last characters may be the beginning of a stop, or the template's tail before one."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if stop.startswith(text[-size:]):
                    longest = size
                    break
        head = text[: len(text) - longest]
        for size in range(min(len(self._tail), len(head)), 0, -1):
            if self._tail.startswith(head[-size:]):
                return longest + size
        return longest


def _part(calls: CallReader) -> Part:
    """What has been collected since the last one."""
    part = Part("".join(calls.text), "".join(calls.reasoning), calls.calls)
    calls.text, calls.reasoning, calls.calls = [], [], []
    return part


def _lead_of_text(bundle: Bundle) -> str:
    """What comes as text before a reply's own, but for reasoning, which the call reader knows."""
    lead, speech = bundle.frame.lead, bundle.speech
    return "" if speech.reasoning is not None and speech.reasoning[1] in lead else _without_controls(bundle, lead)


def _without_controls(bundle: Bundle, written: str) -> str:
    """What a template writes, as text: control tokens are none."""
    for name in bundle.tokenizer.control_ids if written else ():
        written = written.replace(name, "")
    return written


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates take nothing but nine letters and digits."""
    return secrets.token_hex(5)[:9]
