"""`POST /v1/chat/completions`. Plain ASGI: this is the path that every token takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.inference import CallDelta, Delta, Generation, Inference, TokenLogprob
from gateway.routes.body import parse_json, read_body
from gateway.routes.passing import pass_on
from gateway.routes.reply import DONE, Departure, new_id, send_events, send_json
from gateway.wire import chat as wire


class ChatCompletions:
    """Parse → generate → respond."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        inference: Inference = state.inference
        body = parse_json(await read_body(receive, state.settings.limits.body_bytes))
        if (upstream := state.catalog.upstream(body.get("model"))) is not None:
            return await pass_on(inference, upstream, "/chat/completions", body, receive, send)
        request = wire.parse(body)
        generation = await inference.chat(
            request.model,
            request.messages,
            request.sampling,
            stream=request.stream,
            tool_use=request.tools.use,
            options=request.options or None,
            arguments=request.tools.arguments,
        )
        departure = Departure(receive, generation.cancel)
        try:
            if request.stream:
                await send_events(send, _events(request, generation))
            else:
                reply = await _whole(request, generation)
                if not departure.gone:
                    await send_json(send, reply)
        finally:
            departure.over()
            generation.cancel()


async def _events(request: wire.ChatRequest, generation: Generation) -> AsyncIterator[bytes]:
    write = wire.ChunkWriter(new_id("chatcmpl-"), int(time.time()), request.model, include_usage=request.include_usage)
    spoken = None if generation.plain else _Spoken(request, write)
    started: set[int] = set()
    if request.return_token_ids:
        yield write.prompt_ids(generation.prompt_ids)
    async for deltas in generation.deltas():
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
                data += write.text(index, delta.text, _logprobs(delta))
            if delta.finish_reason is not None:
                data += write.finish(index, delta.finish_reason)
        if data:
            yield data
    yield (write.usage(_usage(generation)) if request.include_usage else b"") + DONE


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
            data += write.text(index, delta.text or None, _logprobs(delta))
        for call in delta.calls:
            data += self._call(index, call)
        if delta.text or delta.calls:
            self._said[index] = True
        if delta.finish_reason is not None:
            if not self._said[index]:
                data += write.text(index, "")
            data += write.finish(index, _reason(self._request, delta.finish_reason))
        return data


async def _whole(request: wire.ChatRequest, generation: Generation) -> bytes:
    replies = [_Reply() for _ in range(request.sampling.n)]
    async for deltas in generation.deltas():
        for delta in deltas:
            replies[delta.index].add(delta)
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
        for reply in replies
    ]
    reply_id, created = new_id("chatcmpl-"), int(time.time())
    usage = _usage(generation)
    prompt_ids = generation.prompt_ids if request.return_token_ids else None
    return wire.completion(
        reply_id, created, request.model, choices, usage, older=request.tools.older, prompt_ids=prompt_ids
    )


class _Reply:
    """The deltas of one choice, gathered."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[CallDelta] = []
        self.logprobs: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.finish_reason = "stop"

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.reasoning.append(delta.reasoning)
        for call in delta.calls:
            if call.name is not None:
                self.calls.append(call)
            else:
                self.calls[-1].arguments += call.arguments
        self.logprobs += _logprobs(delta) or []
        self.token_ids += delta.token_ids
        self.finish_reason = delta.finish_reason or self.finish_reason


def _reason(request: wire.ChatRequest, reason: str) -> str:
    return request.tools.finish_reason if reason == "tool_calls" else reason


def _usage(generation: Generation) -> wire.Usage:
    return wire.Usage(
        generation.prompt_tokens,
        generation.completion_tokens,
        generation.cached_tokens,
        generation.reasoning_tokens,
    )


def _logprobs(delta: Delta) -> list[dict[str, Any]] | None:
    if delta.logprobs is None:
        return None
    return [_entry(token) for token in delta.logprobs]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return wire.token_logprob(token.token, token.logprob, token.top)


routes = [Route("/v1/chat/completions", ChatCompletions(), methods=["POST"])]
