"""The life of a response: asked, told as it comes, stored; in the background too, where a restart begins it again.

Place in the flow: routes → **responses** → inference, store. Its one rule: what a client was told is over is stored, and what
was cancelled stays cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.access import Caller
from gateway.chat.conversation import Message
from gateway.errors import (
    ContextLengthExceeded,
    NotFound,
    RateLimited,
    RequestError,
    StoreUnavailable,
    TunegateError,
)
from gateway.generation import Generation
from gateway.inference import Inference
from gateway.patience import ask_patiently
from gateway.replies import Reply, logprob_entries, usage_of
from gateway.store import responses as statements
from gateway.store.database import Store
from gateway.store.ids import new_id
from gateway.store.responses import ChainBroken, ResponseRow
from gateway.wire import responses as wire
from gateway.wire.response_events import Event, EventWriter, replay
from gateway.wire.response_items import Item, compaction, to_messages
from gateway.wire.responses import ResponseRequest

logger = logging.getLogger("tunegate.responses")

AT_ONCE = 4  # in the background
WAITING = 1000
KEPT_S = 30 * 86400.0
_SUMMARY_TOKENS = 1024
_SUMMARISE = (
    "Write a summary of the conversation so far, so that it can be continued from the summary alone: what was asked, what "
    "was found and decided, names, numbers and open questions. Write the summary and nothing else."
)


@dataclass(frozen=True)
class _Asked:
    """A request whose conversation is complete."""

    id: str
    created_at: int
    request: ResponseRequest
    messages: list[Message]
    caller: Caller

    def object(self, status: str, **fields: Any) -> dict[str, Any]:
        return wire.response_object(self.id, self.created_at, self.request, status=status, **fields)


class Responses:
    """Creates, runs and finds them. Holds those that run in the background; all else is in the store."""

    def __init__(self, store: Store, inference: Inference, started: asyncio.Event) -> None:
        """`started`: the models that there are can be asked; none fails because its model is not there yet."""
        self._store, self._inference, self._started = store, inference, started
        self._running: dict[str, _Running] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._swept_at = 0.0

    async def start(self) -> None:
        """Begins again what ran in the background when the process ended."""
        for row in await self._store.read(statements.select_open):
            self._spawn(row, Caller(row.project_id))

    async def stop(self) -> None:
        """Leaves what runs for the next start."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def begin(self, request: ResponseRequest, caller: Caller) -> Answer:
        """A reply under way. Raises as `Inference.chat` does, and NotFound for an unknown `previous_response_id`."""
        asked = await self._asked(new_id("resp_"), int(time.time()), request, caller)
        return Answer(self, asked, await self._generate(asked))

    async def begin_in_background(self, request: ResponseRequest, body: dict[str, Any], caller: Caller) -> ResponseRow:
        """The row of a response that is queued: what was acknowledged is made, whatever happens to this process."""
        if len(self._running) >= WAITING:
            raise RateLimited(f"{WAITING} responses wait in the background; try again later", retry_after_s=30)
        asked = await self._asked(new_id("resp_"), int(time.time()), request, caller)
        row = _row(asked, "queued", asked.object("queued"), body)
        await self._store.write(lambda connection: statements.insert_response(connection, row))
        self._spawn(row, caller)
        await self._sweep()
        return row

    async def count_input(self, request: ResponseRequest, caller: Caller) -> int:
        """How many tokens the request's input has, all that leads to it included."""
        asked = await self._asked("", 0, request, caller)
        return await self._inference.count_prompt(
            request.model, asked.messages, caller=caller, tool_use=request.tools.use, options=request.options or None
        )

    async def compact(self, request: ResponseRequest, caller: Caller) -> dict[str, Any]:
        """A `response.compaction`: one item, the model's own summary, that stands for all that was said."""
        asked = await self._asked(new_id("resp_"), int(time.time()), request, caller)
        messages = [*asked.messages, Message("user", _SUMMARISE)]
        generation = await self._inference.chat(
            request.model, messages, request.sampling, caller=caller, stream=True, options=request.options or None
        )
        reply = Reply()
        async for deltas in generation.deltas():
            for delta in deltas:
                reply.add(delta)
            if generation.completion_tokens >= _SUMMARY_TOKENS:
                generation.cancel()
                break
        item = compaction("Summary of the conversation so far:\n" + "".join(reply.text).strip())
        return wire.compacted_object(asked.id, asked.created_at, [item], usage_of(generation))

    async def find(self, response_id: str, caller: Caller) -> ResponseRow:
        """Raises NotFound."""
        row = await self._store.read(lambda c: statements.select_response(c, response_id, caller.project_id))
        if row is None:
            raise _unknown(response_id)
        return row

    async def input_items(self, response_id: str, caller: Caller) -> list[Item]:
        """What the response answers, oldest first: what came in with it, and all that was said before."""
        row = await self.find(response_id, caller)
        try:
            *before, _ = await self._chain(response_id, caller)
        except NotFound:  # an earlier one was deleted, and with it what it led to
            before = []
        return [*_said(before), *row.items]

    async def events(self, response_id: str, caller: Caller, starting_after: int) -> AsyncIterator[list[Event]]:
        """The events after the one of that number: as they come while it runs, told anew once it is over.

        The last one always comes, so that a client which saw more than is told anew learns how it ended.
        """
        running = self._running.get(response_id)  # before the row: what is over by then is stored
        row = await self.find(response_id, caller)
        if running is None or not row.is_open:
            told = replay(row.body)
            return _at_once([event for event in told if event["sequence_number"] > starting_after] or told[-1:])
        return running.follow(starting_after)

    async def cancel(self, response_id: str, caller: Caller) -> ResponseRow:
        """The response, cancelled; as it is where it was over. Raises RequestError for one in the foreground."""
        row = await self.find(response_id, caller)
        if not row.background:
            raise RequestError(
                f"the response '{response_id}' was not made in the background; close the connection to end such a one",
                param="response_id",
            )
        cancelled = await self._store.write(lambda c: statements.cancel_response(c, response_id, caller.project_id))
        self._end(response_id)
        if cancelled is None:
            raise _unknown(response_id)
        return cancelled

    async def delete(self, response_id: str, caller: Caller) -> None:
        """Gone, also while it runs; deleting twice is fine. Raises NotFound."""
        now = int(time.time())
        if not await self._store.write(
            lambda c: statements.delete_response(c, response_id, caller.project_id, now=now)
        ):
            raise _unknown(response_id)
        self._end(response_id)

    async def keep(self, asked: _Asked, response: dict[str, Any]) -> bool:
        """Stores how a response ended. False when it was cancelled or deleted meanwhile."""
        status: str = response["status"]
        if asked.request.background:
            return await self._store.write(lambda c: statements.finish_response(c, asked.id, status, response))
        if asked.request.store:
            row = _row(asked, status, response, {})
            await self._store.write(lambda connection: statements.insert_response(connection, row))
            await self._sweep()
        return True

    async def _asked(self, response_id: str, created_at: int, request: ResponseRequest, caller: Caller) -> _Asked:
        items: list[Item] = []
        if request.previous_response_id is not None:
            chain = await self._chain(request.previous_response_id, caller)
            if chain[-1].is_open:
                raise RequestError(
                    f"the response '{chain[-1].id}' is {chain[-1].status}; wait until it is over",
                    param="previous_response_id",
                )
            items = _said(chain)
        instructions = [] if request.instructions is None else [Message("system", request.instructions)]
        messages = await asyncio.to_thread(to_messages, [*items, *request.items])
        return _Asked(response_id, created_at, request, [*instructions, *messages], caller)

    async def _chain(self, response_id: str, caller: Caller) -> list[ResponseRow]:
        try:
            return await self._store.read(lambda c: statements.select_chain(c, response_id, caller.project_id))
        except ChainBroken as error:
            raise NotFound(
                f"Previous response with id '{error.args[0]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from error

    async def _generate(self, asked: _Asked) -> Generation:
        request, messages = asked.request, asked.messages
        while True:
            try:
                return await self._inference.chat(
                    request.model,
                    messages,
                    request.sampling,
                    caller=asked.caller,
                    stream=request.stream or request.background,
                    tool_use=request.tools.use,
                    options=request.options or None,
                    arguments=request.tools.arguments,
                )
            except ContextLengthExceeded as error:
                shorter = _shortened(messages) if request.truncates else messages
                if len(shorter) == len(messages):
                    error.param = "input"
                    raise
                messages = shorter

    def _spawn(self, row: ResponseRow, caller: Caller) -> None:
        running = _Running()
        self._running[row.id] = running
        running.task = asyncio.create_task(self._run(row, running, caller), name=f"response {row.id}")

    async def _run(self, row: ResponseRow, running: _Running, caller: Caller) -> None:
        try:
            await self._started.wait()
            async with self._slots:
                body = row.body | {"status": "in_progress"}
                if not await self._store.write(lambda c: statements.begin_response(c, row.id, body)):
                    return
                try:
                    request = wire.parse(row.request)
                    asked = await self._asked(row.id, row.created_at, request, caller)
                    generation = await ask_patiently(lambda: self._generate(asked))
                except TunegateError as error:
                    failed = row.body | {"status": "failed", "error": _failure(error)}
                    await self._store.write(lambda c: statements.finish_response(c, row.id, "failed", failed))
                    running.add(EventWriter().told("failed", failed))
                    return
                async for events in Answer(self, asked, generation).events():
                    running.add(events)
        except StoreUnavailable as error:
            logger.error("the response %s could not be stored: %s", row.id, error.message)
        except Exception:
            logger.exception("the response %s broke off", row.id)
            broken = row.body | {"status": "failed", "error": wire.error_object("the server failed; its log says more")}
            await self._store.write(lambda c: statements.finish_response(c, row.id, "failed", broken))
        finally:
            running.close()
            if self._running.get(row.id) is running:
                del self._running[row.id]

    def _end(self, response_id: str) -> None:
        running = self._running.pop(response_id, None)
        if running is not None:
            running.task.cancel()

    async def _sweep(self) -> None:
        """Once an hour, what is older than 30 days goes."""
        if time.monotonic() - self._swept_at < 3600 and self._swept_at:
            return
        self._swept_at, now = time.monotonic(), int(time.time())
        await self._store.write(lambda c: statements.delete_older(c, now - int(KEPT_S), now=now))


class Answer:
    """One reply: iterate `events()` to its end, or await `whole()`; `cancel()` ends it wherever it is."""

    def __init__(self, responses: Responses, asked: _Asked, generation: Generation) -> None:
        self._responses, self._asked, self._generation = responses, asked, generation
        self._left = False

    def cancel(self) -> None:
        """Nobody listens any more."""
        self._left = True
        self._generation.cancel()

    async def whole(self) -> dict[str, Any]:
        """The response, stored if it is to be. Raises what broke it off."""
        write = EventWriter()
        reason = "stop"
        async for deltas in self._generation.deltas():
            for delta in deltas:
                write.feed(delta.text, delta.reasoning, delta.calls, logprob_entries(delta) or [])
                reason = delta.finish_reason or reason
        write.finish(whole=reason != "length")
        response = self._ended(write, reason)
        await self._responses.keep(self._asked, response)
        return response

    async def events(self) -> AsyncIterator[list[Event]]:
        """What came at once, together. A failure is the last event; one that was cancelled ends without a last one.

        What was said until then is kept in each case.
        """
        write, asked = EventWriter(), self._asked
        begun = asked.object("in_progress")
        yield write.told("created", begun) + write.told("in_progress", begun)
        reason = "stop"
        try:
            async for deltas in self._generation.deltas():
                events: list[Event] = []
                for delta in deltas:
                    events += write.feed(delta.text, delta.reasoning, delta.calls, logprob_entries(delta) or [])
                    reason = delta.finish_reason or reason
                if events:
                    yield events
        except TunegateError as error:
            events = write.break_off()
            if self._left:
                await self._responses.keep(asked, asked.object("cancelled", output=write.output))
                return
            failed = asked.object("failed", output=write.output, error=_failure(error))
            if await self._responses.keep(asked, failed):
                yield events + write.told("failed", failed)
            return
        events = write.finish(whole=reason != "length")
        response = self._ended(write, reason)
        if await self._responses.keep(asked, response):
            yield events + write.told(response["status"], response)

    def _ended(self, write: EventWriter, reason: str) -> dict[str, Any]:
        return self._asked.object(
            "incomplete" if reason == "length" else "completed",
            output=write.output,
            usage=usage_of(self._generation),
            completed_at=int(time.time()),
        )


class _Running:
    """A response in the background: its events so far, for whoever follows."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._more = asyncio.Event()
        self._over = False

    def add(self, events: list[Event]) -> None:
        self._events += events
        self._wake()

    def close(self) -> None:
        self._over = True
        self._wake()

    async def follow(self, starting_after: int) -> AsyncIterator[list[Event]]:
        at = 0
        while True:
            more = self._more
            fresh = [event for event in self._events[at:] if event["sequence_number"] > starting_after]
            at = len(self._events)
            if fresh:
                yield fresh
            if self._over and at == len(self._events):
                return
            await more.wait()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()


def _row(asked: _Asked, status: str, response: dict[str, Any], body: dict[str, Any]) -> ResponseRow:
    request = asked.request
    return ResponseRow(
        id=asked.id,
        project_id=asked.caller.project_id,
        created_at=asked.created_at,
        previous_response_id=request.previous_response_id,
        status=status,
        background=request.background,
        request=body,
        items=request.items,
        body=response,
    )


def _said(chain: Sequence[ResponseRow]) -> list[Item]:
    return [item for row in chain for item in (*row.items, *row.body["output"])]


def _shortened(messages: list[Message]) -> list[Message]:
    """Without the oldest turns: about a quarter of them, up to where a user speaks; the same where none can go."""
    lead = 0
    while lead < len(messages) and messages[lead].role == "system":
        lead += 1
    starts = [at for at in range(lead + 1, len(messages)) if messages[at].role == "user"]
    if not starts:
        return messages
    enough = lead + max(1, (len(messages) - lead) // 4)
    cut = next((at for at in starts if at >= enough), starts[-1])
    return [*messages[:lead], *messages[cut:]]


def _failure(error: TunegateError) -> dict[str, Any]:
    return wire.error_object(error.message, param=error.param, by_client=isinstance(error, RequestError))


def _unknown(response_id: str) -> NotFound:
    return NotFound(f"Response with id '{response_id[:100]}' not found.", param="id")


async def _at_once(events: list[Event]) -> AsyncIterator[list[Event]]:
    yield events
