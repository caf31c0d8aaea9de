"""Events of the decode loop → bytes on a client's connection. On the HTTP thread.

Its rule: one hand-over from the loop a round, one write a request a round. What a slow reader has not taken yet waits in
its mailbox, which max_tokens bounds, and holds up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import orjson
from starlette.types import Receive, Send

from gateway.llama_worker.generation import Event, Finished, Generation
from gateway.llama_worker.wire import DONE, Choice, Completion, Reply

log = logging.getLogger(__name__)


class Gone(Exception):
    """The client closed its connection."""


class Mailbox:
    """Events for one request; filled and emptied on the loop."""

    def __init__(self) -> None:
        self._events: list[Event | Gone] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event | Gone) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        """All events since the last call, at least one; raises Gone when the client has left."""
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        for event in events:
            if isinstance(event, Gone):
                raise event
        return events  # type: ignore[return-value]  # no Gone among them


async def watch(receive: Receive, mailbox: Mailbox) -> None:
    """Puts Gone into the mailbox when the client closes its connection. Call it when the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    mailbox.put(Gone())


async def stream(request: Completion, reply: Reply, mailbox: Mailbox, send: Send) -> None:
    """Writes frames as they come. Raises what failed before the first byte; after it, an error is the last frame."""
    started = False
    tokens = 0
    while True:
        frames = []
        finished = False
        for event in await mailbox.take():
            if isinstance(event, Choice):
                frames.append(reply.frame(event))
                tokens += len(event.ids)
            elif isinstance(event, Finished):
                finished = True
                frames += [reply.usage_frame(tokens, event.cached)] if request.include_usage else []
                frames.append(DONE)
            elif not started:
                raise event
            else:
                finished = True
                frames.append(b"data: " + orjson.dumps(event.body()) + b"\n\n")
        if not started:
            started = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"".join(frames), "more_body": not finished})
        if finished:
            return


async def answer(request: Completion, reply: Reply, mailbox: Mailbox, send: Send) -> None:
    """Writes one body when all choices have ended; raises what failed."""
    choices = [Choice(index, [], []) for index in range(request.n)]
    while True:
        for event in await mailbox.take():
            if isinstance(event, Choice):
                choice = choices[event.index]
                choice.ids += event.ids
                choice.scores += event.scores
                choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
            elif isinstance(event, Finished):
                await send_json(send, 200, reply.body(choices, event.prompt_scores, event.cached))
                return
            else:
                raise event


def publisher(loop: asyncio.AbstractEventLoop) -> Callable[[list[tuple[Generation, Event]]], None]:
    """What the scheduler calls with the events of a round: one hand-over to `loop` for all of them."""

    def deliver(events: list[tuple[Generation, Event]]) -> None:
        for generation, event in events:
            generation.deliver(event)

    return lambda events: call_soon(loop, deliver, events)


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: Any) -> None:
    """Has `function(argument)` called on the loop's thread; nothing once the loop is closed."""
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        log.debug("the event loop is closed; nobody is left to tell")


async def send_json(send: Send, status: int, body: bytes) -> None:
    """Writes a whole JSON response."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
