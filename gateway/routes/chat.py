"""`POST /v1/chat/completions`. Plain ASGI: this is the path that every token takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.inference import Delta, Generation, Inference, TokenLogprob
from gateway.routes.body import parse_json, read_body
from gateway.routes.reply import DONE, Departure, new_id, send_events, send_json
from gateway.wire import chat as wire


class ChatCompletions:
    """Parse → generate → respond."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        inference: Inference = state.inference
        request = wire.parse(parse_json(await read_body(receive, state.settings.limits.body_bytes)))
        generation = await inference.chat(request.model, request.messages, request.sampling, stream=request.stream)
        departure = Departure(receive, generation.cancel)
        try:
            if request.stream:
                await send_events(send, _events(request, generation))
            else:
                body = await _whole(request, generation)
                if not departure.gone:
                    await send_json(send, body)
        finally:
            departure.over()
            generation.cancel()


async def _events(request: wire.ChatRequest, generation: Generation) -> AsyncIterator[bytes]:
    write = wire.ChunkWriter(new_id("chatcmpl-"), int(time.time()), request.model, include_usage=request.include_usage)
    started: set[int] = set()
    async for deltas in generation.deltas():
        data = b""
        for delta in deltas:
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


async def _whole(request: wire.ChatRequest, generation: Generation) -> bytes:
    n = request.sampling.n
    texts: list[list[str]] = [[] for _ in range(n)]
    reasons = ["stop"] * n
    logprobs: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    async for deltas in generation.deltas():
        for delta in deltas:
            texts[delta.index].append(delta.text)
            logprobs[delta.index] += _logprobs(delta) or []
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
    wanted = request.sampling.logprobs is not None
    choices = [
        wire.Choice("".join(text), reason, entries if wanted else None)
        for text, reason, entries in zip(texts, reasons, logprobs, strict=True)
    ]
    return wire.completion(new_id("chatcmpl-"), int(time.time()), request.model, choices, _usage(generation))


def _usage(generation: Generation) -> wire.Usage:
    return wire.Usage(generation.prompt_tokens, generation.completion_tokens, generation.cached_tokens)


def _logprobs(delta: Delta) -> list[dict[str, Any]] | None:
    if delta.logprobs is None:
        return None
    return [_entry(token) for token in delta.logprobs]


def _entry(token: TokenLogprob) -> dict[str, Any]:
    return wire.token_logprob(token.token, token.logprob, token.top)


routes = [Route("/v1/chat/completions", ChatCompletions(), methods=["POST"])]
