"""The one way to ask a model: resolve → render → generate → deltas. Chat and completions call it; none copies it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from gateway.access import Caller
from gateway.chat.bundle import Bundle
from gateway.chat.conversation import Message, Options, RenderError
from gateway.chat.parse import ReplyReader
from gateway.chat.render import Prompt, render_prompt, render_quickly
from gateway.chat.speech import NO_TOOLS, ToolUse, call_opening, opens_json, text_opening
from gateway.embedding import Embeddings, embed, inputs_as_ids
from gateway.engine_request import Sampling, Structured, engine_body, structured_field
from gateway.engines.catalog import Catalog, Served
from gateway.errors import RateLimited, RequestError
from gateway.generation import Generation

# Rendering longer texts than this would hold up other streams for more than about a millisecond.
_INLINE_CHARACTERS = 4000


class Meter(Protocol):
    """Who counts what was used; `gateway.metering`."""

    def add(
        self,
        caller: Caller,
        model: str,
        kind: Literal["completions", "embeddings"],
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int,
    ) -> None: ...


class Inference:
    """Renders and asks. Holds no state of a request."""

    def __init__(self, catalog: Catalog, requests_in_flight: int, meter: Meter | None = None) -> None:
        self._catalog = catalog
        self._limit = requests_in_flight
        self._meter = meter
        self.in_flight = 0
        self.live = 0  # of these, those that somebody waits for: no lines of batches

    async def chat(
        self,
        model: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        caller: Caller,
        stream: bool,
        tool_use: ToolUse = NO_TOOLS,
        options: Options | None = None,
        arguments: Structured | None = None,
    ) -> Generation:
        """A reply to `messages`. Raises ModelNotFound, RequestError, ContextLengthExceeded, EngineUnavailable.

        `arguments` is what those of the one forced call are held to, where the template writes them as JSON.
        """
        served = self._catalog.resolve(model, caller.project_id)
        bundle = served.bundle
        if tool_use.tools and bundle.speech.tool_calls is None:
            raise RequestError(
                f"'{model}' speaks through the template '{bundle.template.name}', which has no form for tool calls that can "
                "be read back; leave 'tools' out or ask a model whose template has one",
                param="tools",
            )
        prompt = await _rendered(bundle, messages, tool_use, options)
        begun = _begun_ids(bundle, prompt, tool_use, as_text=sampling.structured is not None)

        def reader() -> ReplyReader:
            return ReplyReader(
                bundle, sampling.stops, tool_use=tool_use, opens_reasoning=prompt.opens_reasoning, begun=begun
            )

        by_text = bool(sampling.stops) or bool(bundle.stop_strings) or tool_use.single
        ids = [*prompt.ids, *begun] if begun else prompt.ids
        structured = arguments if tool_use.forced and opens_json(bundle.speech) else sampling.structured
        return await self._generate(
            served,
            ids,
            sampling,
            reader,
            caller=caller,
            stream=stream or by_text,
            param="messages",
            structured=structured,
        )

    async def count_prompt(
        self,
        model: str,
        messages: Sequence[Message],
        *,
        caller: Caller,
        tool_use: ToolUse = NO_TOOLS,
        options: Options | None = None,
    ) -> int:
        """How many tokens `chat` would send the engine for these messages. Raises ModelNotFound, RequestError."""
        bundle = self._catalog.resolve(model, caller.project_id).bundle
        return len((await _rendered(bundle, messages, tool_use, options)).ids)

    async def complete(
        self,
        model: str,
        prompt: str | list[int],
        sampling: Sampling,
        *,
        caller: Caller,
        stream: bool,
        score_prompt: bool = False,
    ) -> Generation:
        """A continuation of a text or of token ids. Raises as `chat` does.

        With `score_prompt` the prompt's log-probabilities come along, in one piece with the reply (`prompt_logprobs`).
        """
        served = self._catalog.resolve(model, caller.project_id)
        tokenizer = served.bundle.tokenizer
        if isinstance(prompt, str):
            encode = tokenizer.encode
            ids = await asyncio.to_thread(encode, prompt) if len(prompt) > _INLINE_CHARACTERS else encode(prompt)
            ids = tokenizer.prefix_ids + ids
        else:
            ids = prompt
            if ids and max(ids) >= tokenizer.vocab_size:
                raise RequestError(
                    f"'prompt' holds the token id {max(ids)}, and the model has {tokenizer.vocab_size} tokens",
                    param="prompt",
                )
        if not ids:
            raise RequestError("'prompt' is empty; give at least one character or token", param="prompt")

        def reader() -> ReplyReader:
            return ReplyReader(served.bundle, sampling.stops, raw=True)

        scored = len(ids) if isinstance(prompt, list) else len(ids) - len(tokenizer.prefix_ids)
        stream = (stream or bool(sampling.stops)) and not score_prompt
        return await self._generate(
            served,
            ids,
            sampling,
            reader,
            caller=caller,
            stream=stream,
            param="prompt",
            structured=sampling.structured,
            scored=scored if score_prompt else 0,
        )

    async def embed(self, model: str, inputs: Sequence[str | list[int]], *, caller: Caller) -> Embeddings:
        """The vectors of texts or token ids. Raises as `chat` does; RequestError where the model makes none."""
        served = self._catalog.resolve(model, caller.project_id)
        told = self._catalog.base(served.base).engine.version
        if told.get("kind") == "llama" and not told.get("embedding_width"):
            raise RequestError(f"the model '{model}' makes no embeddings: its file names no pooling", param="model")
        if self.in_flight >= self._limit:
            raise RateLimited(f"{self._limit} requests are being answered; try again shortly", retry_after_s=1)
        self._begun(caller)
        try:
            ids = await asyncio.to_thread(inputs_as_ids, served, inputs)
            if caller.allowance is not None:
                caller.allowance.take_tokens(sum(map(len, ids)))
            made = await embed(served, ids)
        finally:
            self._over(caller)
        if self._meter is not None:
            self._meter.add(caller, served.name, "embeddings", made.prompt_tokens, 0, 0)
        return made

    @asynccontextmanager
    async def passing(self, caller: Caller) -> AsyncIterator[None]:
        """A request that is passed on to an upstream, counted among those under way. Raises RateLimited."""
        if self.in_flight >= self._limit:
            raise RateLimited(f"{self._limit} requests are being answered; try again shortly", retry_after_s=1)
        self._begun(caller)
        try:
            yield
        finally:
            self._over(caller)

    def prompt_text(self, model: str, prompt: str | list[int], *, caller: Caller) -> str:
        """A plain prompt as text, for `echo`."""
        if isinstance(prompt, str):
            return prompt
        return self._catalog.resolve(model, caller.project_id).bundle.tokenizer.decode(prompt)

    async def _generate(
        self,
        served: Served,
        ids: list[int],
        sampling: Sampling,
        reader: Callable[[], ReplyReader],
        *,
        caller: Caller,
        stream: bool,
        param: str,
        structured: Structured | None,
        scored: int = 0,
    ) -> Generation:
        if self.in_flight >= self._limit:
            raise RateLimited(f"{self._limit} requests are being answered; try again shortly", retry_after_s=1)
        told = self._catalog.base(served.base).engine.version
        body = engine_body(served, ids, sampling, told, stream=stream, param=param, cache_salt=caller.cache_salt)
        if structured is not None:
            body["structured_outputs"] = structured_field(structured, served.base, told)
        if scored:
            body["prompt_logprobs"] = sampling.logprobs or 0
        readers = [reader() for _ in range(sampling.n)]
        if caller.allowance is not None:
            caller.allowance.take_tokens(len(ids))
        self._begun(caller)
        try:
            events = await served.client.stream(body)
        except BaseException:
            self._over(caller)
            if caller.allowance is not None:
                caller.allowance.owe_tokens(-len(ids))
            raise
        return Generation(
            self._ended,
            served,
            events,
            readers,
            sampling,
            caller=caller,
            prompt_ids=ids,
            structured=structured,
            scored=scored,
        )

    def _begun(self, caller: Caller) -> None:
        self.in_flight += 1
        self.live += not caller.is_batch

    def _over(self, caller: Caller) -> None:
        self.in_flight -= 1
        self.live -= not caller.is_batch

    def _ended(self, generation: Generation) -> None:
        caller, completion_tokens = generation.caller, generation.completion_tokens
        self._over(caller)
        if caller.allowance is not None:
            caller.allowance.owe_tokens(completion_tokens)
        if self._meter is not None:
            prompt_tokens, cached_tokens = generation.prompt_tokens, generation.cached_tokens
            self._meter.add(caller, generation.model, "completions", prompt_tokens, completion_tokens, cached_tokens)


async def _rendered(bundle: Bundle, messages: Sequence[Message], tool_use: ToolUse, options: Options | None) -> Prompt:
    tools = tool_use.tools or None
    try:
        prompt = render_quickly(bundle, messages, tools, options)
        if prompt is None:
            prompt = await asyncio.to_thread(render_prompt, bundle, messages, tools, options)
    except RenderError as error:
        at_tools = tools and not getattr(bundle.template, "offers_tools", False)
        raise RequestError(f"{error}", param="tools" if at_tools else "messages") from error
    return prompt


def _begun_ids(bundle: Bundle, prompt: Prompt, tool_use: ToolUse, *, as_text: bool) -> list[int]:
    """The beginning of a reply that must be a call, or text throughout: it goes behind the prompt and counts as the reply's."""
    speech, opened = bundle.speech, prompt.opens_reasoning
    if tool_use.forced:
        opening = call_opening(speech, tool_use.forced, in_reasoning=opened, lead=bundle.frame.lead)
    else:
        opening = text_opening(speech, in_reasoning=opened) if as_text else ""
    return bundle.tokenizer.encode_continuation(opening) if opening else []
