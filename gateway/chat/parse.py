"""Ids → text of a reply, as they come: detokenised, cut at stop strings, without what the template puts around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gateway.chat.bundle import Bundle


class ReplyReader:
    """Reads one reply. The deltas that it returns add up to the same text however the ids were split."""

    __slots__ = ("_bytes", "_control", "_cuts", "_decode", "_held", "_lead", "_stops", "_tail", "stopped")

    def __init__(self, bundle: Bundle, stops: Sequence[str] = (), *, raw: bool = False) -> None:
        """`stops` are the client's stop strings. `raw` is for plain completions: nothing of a template is looked for."""
        self._control = bundle.tokenizer.control_id_set
        self._bytes = bundle.tokenizer.token_bytes
        self._decode = bundle.tokenizer.incremental_decoder().decode
        self._lead = "" if raw else bundle.frame.lead
        self._tail = "" if raw else bundle.frame.tail
        self._stops = tuple(stops) if raw else (*stops, *bundle.stop_strings)
        self._cuts = bool(self._stops or self._tail)
        self._held = ""
        self.stopped = False  # a stop string was met: nothing more is read, the engine may be told to stop

    def feed(self, ids: Iterable[int]) -> str:
        """The text that can be shown by now; control tokens are not text."""
        if self.stopped:
            return ""
        control, token_bytes = self._control, self._bytes
        text = self._decode(b"".join([token_bytes(token_id) for token_id in ids if token_id not in control]))
        if self._lead and text:
            text = self._strip_lead(text)
        return self._release(text) if self._cuts else text

    def finish(self, *, at_stop: bool) -> str:
        """What was held back: all of it, but for the template's tail when the reply ended at its stop."""
        if self.stopped:
            return ""
        held, self._held = self._held + self._decode(b"", True), ""
        if at_stop and self._tail:
            held = held.removesuffix(self._tail)
        return held

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
