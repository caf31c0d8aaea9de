"""`POST /v1/completions`: several prompts run side by side, their choices numbered prompt by prompt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.inference import Delta, Generation, Inference, TokenLogprob
from gateway.routes.body import parse_json, read_body
from gateway.routes.reply import DONE, Departure, new_id, send_events, send_json
from gateway.wire import completions as wire
from gateway.wire.chat import Usage


class Completions:
    """Parse → generate → respond."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        inference: Inference = state.inference
        request = wire.parse(parse_json(await read_body(receive, state.settings.limits.body_bytes)))
        generations: list[Generation] = []

        def cancel() -> None:
            for generation in generations:
                generation.cancel()

        try:
            for prompt in request.prompts:
                generations.append(
                    await inference.complete(request.model, prompt, request.sampling, stream=request.stream)
                )
            echoes = [inference.prompt_text(request.model, p) if request.echo else "" for p in request.prompts]
            departure = Departure(receive, cancel)
            try:
                if request.stream:
                    await send_events(send, _events(request, generations, echoes))
                else:
                    body = await _whole(request, generations, echoes)
                    if not departure.gone:
                        await send_json(send, body)
            finally:
                departure.over()
        finally:
            cancel()


async def _events(
    request: wire.CompletionRequest, generations: list[Generation], echoes: list[str]
) -> AsyncIterator[bytes]:
    reply_id, created = new_id("cmpl-"), int(time.time())
    shown = _Progress(request.sampling.n, echoes)
    async for choices in _merge(generations, shown):
        yield b"".join(
            wire.chunk(reply_id, created, request.model, [choice], include_usage=request.include_usage)
            for choice in choices
        )
    usage = wire.usage_chunk(reply_id, created, request.model, _usage(generations)) if request.include_usage else b""
    yield usage + DONE


async def _whole(request: wire.CompletionRequest, generations: list[Generation], echoes: list[str]) -> bytes:
    n = request.sampling.n
    shown = _Progress(n, echoes)
    parts: list[list[wire.TextChoice]] = [[] for _ in range(n * len(generations))]
    async for choices in _merge(generations, shown):
        for choice in choices:
            parts[choice.index].append(choice)
    whole = [
        wire.TextChoice(
            index,
            "".join(part.text for part in of_choice),
            of_choice[-1].finish_reason,
            None
            if request.sampling.logprobs is None
            else [entry for part in of_choice for entry in part.logprobs or []],
            of_choice[0].text_offset,
        )
        for index, of_choice in enumerate(parts)
    ]
    return wire.completion(new_id("cmpl-"), int(time.time()), request.model, whole, _usage(generations))


class _Progress:
    """How far each choice has been shown; the echo goes before its first text."""

    def __init__(self, n: int, echoes: list[str]) -> None:
        self._n, self._echoes = n, echoes
        self._offsets: dict[int, int] = {}

    def show(self, number: int, delta: Delta) -> wire.TextChoice:
        index = number * self._n + delta.index
        text = delta.text if index in self._offsets else self._echoes[number] + delta.text
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        logprobs = None if delta.logprobs is None else [_entry(token) for token in delta.logprobs]
        return wire.TextChoice(index, text, delta.finish_reason, logprobs, offset)


async def _merge(generations: list[Generation], shown: _Progress) -> AsyncIterator[list[wire.TextChoice]]:
    """The choices of all prompts as they come."""
    if len(generations) == 1:
        async for deltas in generations[0].deltas():
            yield [shown.show(0, delta) for delta in deltas]
        return
    queue: asyncio.Queue[tuple[int, list[Delta]] | None] = asyncio.Queue(maxsize=64)

    async def pump(number: int, generation: Generation) -> None:
        async for deltas in generation.deltas():
            await queue.put((number, deltas))

    async def pump_all() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for number, generation in enumerate(generations):
                    group.create_task(pump(number, generation))
        finally:
            await queue.put(None)

    pumping = asyncio.create_task(pump_all())
    try:
        while (item := await queue.get()) is not None:
            yield [shown.show(item[0], delta) for delta in item[1]]
        try:
            await pumping
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
    finally:
        pumping.cancel()


def _usage(generations: list[Generation]) -> Usage:
    return Usage(
        sum(generation.prompt_tokens for generation in generations),
        sum(generation.completion_tokens for generation in generations),
        sum(generation.cached_tokens for generation in generations),
    )


def _entry(token: TokenLogprob) -> tuple[str, float, dict[str, float]]:
    top = {name.decode("utf-8", "replace"): logprob for name, logprob in token.top}
    return token.token.decode("utf-8", "replace"), token.logprob, top


routes = [Route("/v1/completions", Completions(), methods=["POST"])]
