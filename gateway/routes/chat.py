"""`POST /v1/chat/completions`. Plain ASGI: this is the path that every token takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import orjson
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.generation import Delta, Generation
from gateway.inference import Inference
from gateway.replies import Reply, logprob_entries, usage_of
from gateway.routes import caller_of
from gateway.routes.body import read_asked
from gateway.routes.passing import pass_on
from gateway.routes.reply import DONE, Departure, send_events, send_json
from gateway.routes.stored_completions import keep_completion
from gateway.store.ids import new_id
from gateway.wire import chat as wire

_Keep = Callable[[dict[str, Any]], Awaitable[None]]


class ChatCompletions:
    """Parse → generate → respond."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        inference: Inference = state.inference
        body = await read_asked(receive, state.settings, "chat")
        caller = caller_of(scope)
        if (upstream := state.catalog.upstream(body.get("model"))) is not None:
            return await pass_on(inference, upstream, "/chat/completions", body, caller, receive, send)
        request = wire.parse(body)
        keep = None if request.kept is None else partial(keep_completion, state.store, request.kept, caller.project_id)
        with Departure(receive) as departure:
            generation = await inference.chat(
                request.model,
                request.messages,
                request.sampling,
                caller=caller,
                stream=request.stream,
                tool_use=request.tools.use,
                options=request.options or None,
                arguments=request.tools.arguments,
            )
            departure.ends(generation.cancel)
            try:
                if request.stream:
                    await send_events(send, _events(request, generation, keep))
                else:
                    reply = await _whole(request, generation)
                    if not departure.gone:
                        if keep is not None:
                            await keep(reply)
                        await send_json(send, orjson.dumps(reply))
            finally:
                generation.cancel()


async def _events(request: wire.ChatRequest, generation: Generation, keep: _Keep | None) -> AsyncIterator[bytes]:
    reply_id, created = new_id("chatcmpl-"), int(time.time())
    write = wire.ChunkWriter(reply_id, created, request.model, include_usage=request.include_usage)
    gathered = None if keep is None else _Gathered(request)
    spoken = None if generation.plain else _Spoken(request, write)
    started: set[int] = set()
    if request.return_token_ids:
        yield write.prompt_ids(generation.prompt_ids)
    async for deltas in generation.deltas():
        if gathered is not None:
            gathered.add(deltas)
        data = b""
        for delta in deltas:
            if request.return_token_ids:
                data += write.ids(delta.index, delta.token_ids)
            if spoken is not None:
                data += spoken.frames(delta)
                continue
            index = delta.index
            if index not in started:
                started.add(index)
                data += write.role(index)
            if delta.text or delta.logprobs:
                data += write.text(index, delta.text, logprob_entries(delta))
            if delta.finish_reason is not None:
                data += write.finish(index, delta.finish_reason)
        if data:
            yield data
    if gathered is not None and keep is not None:
        await keep(gathered.completion(reply_id, created, generation))  # what was told is over is stored
    yield (write.usage(usage_of(generation)) if request.include_usage else b"") + DONE


class _Spoken:
    """Writes the frames of replies that may hold reasoning and calls: their content is null until there is some."""

    def __init__(self, request: wire.ChatRequest, write: wire.ChunkWriter) -> None:
        self._request, self._write = request, write
        self._call = write.function_call if request.tools.older else write.call
        self._said: dict[int, bool] = {}  # by choice: whether there was content or a call

    def frames(self, delta: Delta) -> bytes:
        write, index, data = self._write, delta.index, b""
        if index not in self._said:
            self._said[index] = False
            data += write.role(index, content=b"null")
        if delta.reasoning:
            data += write.reasoning(index, delta.reasoning)
        if delta.text or delta.logprobs:
            data += write.text(index, delta.text or None, logprob_entries(delta))
        for call in delta.calls:
            data += self._call(index, call)
        if delta.text or delta.calls:
            self._said[index] = True
        if delta.finish_reason is not None:
            if not self._said[index]:
                data += write.text(index, "")
            data += write.finish(index, _reason(self._request, delta.finish_reason))
        return data


class _Gathered:
    """The replies of a request whole: for one that is not streamed, and for one that is stored."""

    def __init__(self, request: wire.ChatRequest) -> None:
        self._request = request
        self._replies = [Reply() for _ in range(request.sampling.n)]

    def add(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            self._replies[delta.index].add(delta)

    def completion(self, reply_id: str, created: int, generation: Generation) -> dict[str, Any]:
        request = self._request
        wanted = request.sampling.logprobs is not None
        choices = [
            wire.Choice(
                "".join(reply.text),
                _reason(request, reply.finish_reason),
                reply.logprobs if wanted else None,
                "".join(reply.reasoning),
                reply.calls,
                reply.token_ids,
            )
            for reply in self._replies
        ]
        prompt_ids = generation.prompt_ids if request.return_token_ids else None
        return wire.completion(
            reply_id,
            created,
            request.model,
            choices,
            usage_of(generation),
            older=request.tools.older,
            prompt_ids=prompt_ids,
        )


async def _whole(request: wire.ChatRequest, generation: Generation) -> dict[str, Any]:
    gathered = _Gathered(request)
    async for deltas in generation.deltas():
        gathered.add(deltas)
    return gathered.completion(new_id("chatcmpl-"), int(time.time()), generation)


def _reason(request: wire.ChatRequest, reason: str) -> str:
    return request.tools.finish_reason if reason == "tool_calls" else reason


routes = [Route("/v1/chat/completions", ChatCompletions(), methods=["POST"])]
