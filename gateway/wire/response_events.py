"""A response as it comes: typed events with sequence numbers, and the output that they add up to. Pure.

Its one rule: stream and whole are one thing. What is told of an item when it is done is what the response holds in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from gateway.chat.calls import CallDelta
from gateway.wire.response_items import Item, new_item_id

Event = dict[str, Any]


class EventWriter:
    """Feed it what a model says; each call gives the events that tell of it. `output` is the items so far."""

    def __init__(self) -> None:
        self.output: list[Item] = []
        self._sequence = -1
        self._open: _Part | None = None

    def told(self, kind: str, response: dict[str, Any]) -> list[Event]:
        """`response.created`, `.completed`, …, with the response as it is now."""
        return [self._event(f"response.{kind}", response=response)]

    def feed(
        self,
        text: str,
        reasoning: str = "",
        calls: Iterable[CallDelta] = (),
        logprobs: Sequence[dict[str, Any]] = (),
    ) -> list[Event]:
        """What came since the last time, in the order in which models write: reasoning, text, calls."""
        events: list[Event] = []
        if reasoning:
            events += self._turn_to("reasoning_text")
            events.append(self._grow(reasoning))
        if text or (logprobs and isinstance(self._open, _TextPart)):
            events += self._turn_to("output_text")
            events.append(self._grow(text, logprobs))
        for call in calls:
            if call.name is not None:
                events += self._close("completed")
                events += self._begin(_CallPart(call))
            if call.arguments:
                events.append(self._grow("".join(call.arguments)))
        return events

    def finish(self, *, whole: bool) -> list[Event]:
        """Ends the last item, `incomplete` unless the reply is whole. A reply of nothing is a message without text."""
        events = self._turn_to("output_text") if not self.output else []
        return events + self._close("completed" if whole else "incomplete")

    def break_off(self) -> list[Event]:
        """Ends the last item where it is, `incomplete`."""
        return self._close("incomplete")

    def _turn_to(self, kind: str) -> list[Event]:
        """To the item that takes text of this kind: the open one, or one more."""
        if self._open is not None and self._open.kind == kind:
            return []
        return self._close("completed") + self._begin(_ReasoningPart() if kind == "reasoning_text" else _TextPart())

    def _begin(self, part: _Part) -> list[Event]:
        self._open = part
        self.output.append(part.item("in_progress"))
        events = [self._event("response.output_item.added", item=self.output[-1], **self._place())]
        if part.kind != "arguments":
            events.append(self._event("response.content_part.added", part=part.content(), **self._inside()))
        return events

    def _grow(self, delta: str, logprobs: Sequence[dict[str, Any]] = ()) -> Event:
        part = self._part()
        part.parts.append(delta)
        extra: dict[str, Any] = {}
        if isinstance(part, _TextPart):
            part.logprobs += logprobs
            extra = {"logprobs": list(logprobs)}
        return self._event(f"response.{part.event}.delta", delta=delta, **self._inside(), **extra)

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        part = self._part()
        whole: dict[str, Any] = {"arguments" if part.kind == "arguments" else "text": part.text}
        if isinstance(part, _TextPart):
            whole["logprobs"] = part.logprobs
        events = [self._event(f"response.{part.event}.done", **self._inside(), **whole)]
        if part.kind != "arguments":
            events.append(self._event("response.content_part.done", part=part.content(), **self._inside()))
        self.output[-1] = part.item(status)
        events.append(self._event("response.output_item.done", item=self.output[-1], **self._place()))
        self._open = None
        return events

    def _part(self) -> _Part:
        assert self._open is not None
        return self._open

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self.output) - 1}

    def _inside(self) -> dict[str, Any]:
        part = self._part()
        place = {"item_id": part.id, **self._place()}
        return place if part.kind == "arguments" else place | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence, **fields}


def replay(response: dict[str, Any]) -> list[Event]:
    """The events of a response that is over, told anew: each text in one piece."""
    write = EventWriter()
    begun = {**response, "status": "in_progress", "output": [], "usage": None, "completed_at": None}
    begun |= {"incomplete_details": None, "error": None}
    events = write.told("created", begun) + write.told("in_progress", begun)
    for index, item in enumerate(response["output"]):
        events += _retold(write, item, index)
    status = response["status"]
    return events + write.told(status if status in ("completed", "incomplete") else "failed", response)


def frame(event: Event) -> bytes:
    """A server-sent event."""
    return b"event: " + str(event["type"]).encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


def _retold(write: EventWriter, item: Item, index: int) -> list[Event]:
    """An item's own events, under its own ids."""
    part: _Part
    match item["type"]:
        case "reasoning":
            part, said = _ReasoningPart(), "".join(content["text"] for content in item["content"])
        case "function_call":
            part, said = _CallPart(CallDelta(index, item["call_id"], item["name"])), item["arguments"]
        case _:
            part, said = _TextPart(), "".join(content["text"] for content in item["content"])
            part.logprobs = [entry for content in item["content"] for entry in content.get("logprobs") or ()]
    part.id = item["id"]
    events = write._begin(part)
    if said:
        logprobs = part.logprobs if isinstance(part, _TextPart) else []
        if isinstance(part, _TextPart):
            part.logprobs = []
        events.append(write._grow(said, logprobs))
    return events + write._close(item["status"])


class _Part:
    """The item that is being said: an id, and its text so far."""

    kind: str
    event: str

    def __init__(self, prefix: str) -> None:
        self.id = new_item_id(prefix)
        self.parts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def content(self) -> dict[str, Any]:
        """The part of the item's content, as far as it is said."""
        return {"type": self.kind, "text": self.text}

    def item(self, status: str) -> Item:
        raise NotImplementedError


class _ReasoningPart(_Part):
    kind, event = "reasoning_text", "reasoning_text"

    def __init__(self) -> None:
        super().__init__("rs_")

    def item(self, status: str) -> Item:
        content = [] if status == "in_progress" else [self.content()]
        return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}


class _TextPart(_Part):
    kind, event = "output_text", "output_text"

    def __init__(self) -> None:
        super().__init__("msg_")
        self.logprobs: list[dict[str, Any]] = []

    def content(self) -> dict[str, Any]:
        return {"type": self.kind, "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def item(self, status: str) -> Item:
        content = [] if status == "in_progress" else [self.content()]
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": content}


class _CallPart(_Part):
    kind, event = "arguments", "function_call_arguments"

    def __init__(self, call: CallDelta) -> None:
        super().__init__("fc_")
        self._call_id, self._name = call.id, call.name

    def item(self, status: str) -> Item:
        return {
            "id": self.id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
            "status": status,
        }
