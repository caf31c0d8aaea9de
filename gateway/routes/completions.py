"""`POST /v1/completions`: several prompts run side by side, their choices numbered prompt by prompt."""

from __future__ import annotations

import asyncio
import codecs
import math
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.access import Caller
from gateway.errors import RequestError
from gateway.generation import Delta, Generation, TokenLogprob
from gateway.inference import Inference
from gateway.routes import caller_of
from gateway.routes.body import read_asked
from gateway.routes.passing import pass_on
from gateway.routes.reply import DONE, Departure, send_events, send_json
from gateway.store.ids import new_id
from gateway.wire import completions as wire
from gateway.wire.chat import Usage


class Completions:
    """Parse → generate → respond."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["app"].state
        inference: Inference = state.inference
        asked = await read_asked(receive, state.settings, "completions")
        caller = caller_of(scope)
        if (upstream := state.catalog.upstream(asked.get("model"))) is not None:
            return await pass_on(inference, upstream, "/completions", asked, caller, receive, send)
        request = wire.parse(asked)
        generations: list[Generation] = []

        def cancel() -> None:
            for generation in generations:
                generation.cancel()

        with Departure(receive) as departure:
            try:
                for prompt in request.prompts:
                    generations.append(await _ask(inference, request, prompt, caller))
                echoes = [
                    inference.prompt_text(request.model, prompt, caller=caller) if request.echo else ""
                    for prompt in request.prompts
                ]
                departure.ends(cancel)
                if request.stream:
                    await send_events(send, _events(request, generations, echoes))
                else:
                    try:
                        body = await _whole(request, generations, echoes)
                    except RequestError as error:
                        if error.param == "n" and request.best_of > request.sampling.n:
                            error.param = "best_of"  # which is what the engine was asked for as its n
                        raise
                    if not departure.gone:
                        await send_json(send, body)
            finally:
                cancel()


async def _ask(
    inference: Inference, request: wire.CompletionRequest, prompt: str | list[int], caller: Caller
) -> Generation:
    sampling, scored = request.sampling, request.echo and request.sampling.logprobs is not None
    if request.best_of > sampling.n:
        sampling = replace(sampling, n=request.best_of, logprobs=sampling.logprobs or 0)  # the best is told by them
    return await inference.complete(
        request.model, prompt, sampling, caller=caller, stream=request.stream, score_prompt=scored
    )


async def _events(
    request: wire.CompletionRequest, generations: list[Generation], echoes: list[str]
) -> AsyncIterator[bytes]:
    reply_id, created = new_id("cmpl-"), int(time.time())
    shown = _Progress(request, generations, echoes)
    async for choices in _merge(generations, shown):
        yield b"".join(
            wire.chunk(reply_id, created, request.model, [choice], include_usage=request.include_usage)
            for choice in choices
        )
    usage = _usage(request, generations)
    yield (wire.usage_chunk(reply_id, created, request.model, usage) if request.include_usage else b"") + DONE


async def _whole(request: wire.CompletionRequest, generations: list[Generation], echoes: list[str]) -> bytes:
    made = request.best_of
    shown = _Progress(request, generations, echoes)
    parts: list[list[wire.TextChoice]] = [[] for _ in range(made * len(generations))]
    async for choices in _merge(generations, shown):
        for choice in choices:
            parts[choice.index].append(choice)
    best: list[list[wire.TextChoice]] = []
    for number in range(len(generations)):
        mine = range(number * made, number * made + made)
        # A stable sort: of equals, the first. The n best are shown from the best on.
        ranked = sorted(mine, key=lambda index: -shown.mean_logprob(index)) if made > request.sampling.n else mine
        best += [parts[index] for index in ranked[: request.sampling.n]]
    whole = [
        wire.TextChoice(
            index,
            "".join(part.text for part in of_choice),
            of_choice[-1].finish_reason,
            None
            if request.sampling.logprobs is None
            else [entry for part in of_choice for entry in part.logprobs or []],
        )
        for index, of_choice in enumerate(best)
    ]
    return wire.completion(new_id("cmpl-"), int(time.time()), request.model, whole, _usage(request, generations))


class _Progress:
    """How far each choice has been shown; the echo goes before its first text."""

    def __init__(self, request: wire.CompletionRequest, generations: list[Generation], echoes: list[str]) -> None:
        self._request, self._generations, self._echoes = request, generations, echoes
        self._scribes: dict[int, _Scribe] = {}
        self._sums: dict[int, tuple[float, int]] = {}

    def show(self, number: int, delta: Delta) -> wire.TextChoice:
        index = number * self._request.best_of + delta.index
        text, made = delta.text, delta.logprobs
        entries: list[wire.ScoredToken] = []
        scribe = self._scribes.get(index)
        if scribe is None:
            text = self._echoes[number] + text
            scribe = self._scribes[index] = _Scribe()
            entries += scribe.prompt(self._echoes[number], self._generations[number].prompt_logprobs)
        entries += [scribe.entry(token.token, token) for token in made or []]
        sum_before, count = self._sums.get(index, (0.0, 0))
        told = made or []
        self._sums[index] = sum_before + sum(token.logprob for token in told), count + len(told)
        return wire.TextChoice(
            index, text, delta.finish_reason, entries if self._request.sampling.logprobs is not None else None
        )

    def mean_logprob(self, index: int) -> float:
        """Of the tokens that a choice made; of one that made none, the least there is."""
        total, count = self._sums[index]
        return total / count if count else -math.inf


class _Scribe:
    """Spells the tokens of one choice and counts the characters before each."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def prompt(self, echo: str, scores: list[tuple[bytes, TokenLogprob | None]]) -> list[wire.ScoredToken]:
        """The echoed prompt's tokens; a space that the tokenizer put before the text is no part of the first."""
        if not scores:
            self._offset = len(echo)
            return []
        whole = b"".join(token for token, _ in scores).decode("utf-8", "replace")
        extra = 1 if whole.startswith(" ") and not echo.startswith(" ") else 0
        first, *others = scores
        return [self.entry(token, score) for token, score in [(first[0][extra:], first[1]), *others]]

    def entry(self, token: bytes, score: TokenLogprob | None) -> wire.ScoredToken:
        offset = self._offset
        self._offset += len(self._decode(token))
        text = token.decode("utf-8", "replace")
        if score is None:
            return wire.ScoredToken(text, offset, None, None)
        top = {name.decode("utf-8", "replace"): logprob for name, logprob in score.top}
        top.setdefault(text, score.logprob)  # the token itself is always told
        return wire.ScoredToken(text, offset, score.logprob, top)


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
        except asyncio.CancelledError:
            raise  # nobody takes from the queue any more
        except BaseException:
            await queue.put(None)
            raise
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


def _usage(request: wire.CompletionRequest, generations: list[Generation]) -> Usage:
    return Usage(
        sum(generation.prompt_tokens for generation in generations),
        sum(generation.completion_tokens for generation in generations),
        sum(generation.cached_tokens for generation in generations),
    )


routes = [Route("/v1/completions", Completions(), methods=["POST"])]
