"""The one way to ask a model: resolve → render → generate → deltas. Chat and completions call it; none copies it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from gateway.access import Caller
from gateway.chat.bundle import Bundle
from gateway.chat.calls import CallDelta
from gateway.chat.conversation import Message, Options, RenderError
from gateway.chat.parse import Part, ReplyReader
from gateway.chat.render import Prompt, render_prompt, render_quickly
from gateway.chat.speech import NO_TOOLS, ToolUse, call_opening, opens_json, text_opening
from gateway.embedding import Embeddings, embed
from gateway.engine_request import Sampling, Structured, engine_body, structured_field
from gateway.engines.catalog import Catalog, Served
from gateway.engines.client import EngineStream
from gateway.errors import EngineError, RateLimited, RequestError

# Rendering longer texts than this would hold up other streams for more than about a millisecond.
_INLINE_CHARACTERS = 4000
_LEAST_LOGPROB = -9999.0


__all__ = ["CallDelta", "Delta", "Embeddings", "Generation", "Inference", "Sampling", "TokenLogprob"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, what the model gave it, and the likeliest others (natural logarithms)."""

    token: bytes
    logprob: float
    top: list[tuple[bytes, float]]


@dataclass(slots=True)
class Delta:
    """What a choice got since the last one. `finish_reason` ("stop", "length", "tool_calls") comes once, with the last."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()
    token_ids: Sequence[int] = ()  # as the engine sent them


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
            made = await embed(served, inputs)
        finally:
            self._over(caller)
        if caller.allowance is not None:
            caller.allowance.owe_tokens(made.prompt_tokens)
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
            self,
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


class Generation:
    """One answer under way: iterate `deltas()` to its end, or `cancel()` it."""

    def __init__(
        self,
        inference: Inference,
        served: Served,
        stream: EngineStream,
        readers: list[ReplyReader],
        sampling: Sampling,
        *,
        caller: Caller,
        prompt_ids: list[int],
        structured: Structured | None,
        scored: int = 0,
    ) -> None:
        """`scored`: how many of the prompt's last ids have log-probabilities to come."""
        bundle = served.bundle
        self._inference, self._bundle, self._stream, self._readers = inference, bundle, stream, readers
        self.caller, self.model = caller, served.name
        self._open = set(range(len(readers)))
        self._stop_ids = frozenset(bundle.stop_ids)
        self._client_stops = frozenset(sampling.stop_token_ids)
        self._logprobs = sampling.logprobs
        self._structured = structured
        self._scored = scored
        self._says_nothing = sampling.max_tokens == 0  # the engine makes one token at least
        self._live = True
        self._cut = False  # a stop string ended a choice: the engine does not know and would go on
        self.plain = all(reader.plain for reader in readers)  # text is all that can come
        self.prompt_ids = prompt_ids
        self.prompt_logprobs: list[tuple[bytes, TokenLogprob | None]] = []  # None: nothing comes before it
        self.completion_tokens = 0
        self.cached_tokens = 0

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """What came at once, together; each choice ends with a delta that has a finish_reason."""
        try:
            while self._open:
                frames = await self._stream.frames()
                if not frames:
                    break
                deltas = [delta for frame in frames for delta in self._read(frame)]
                if deltas:
                    yield deltas
            if self._open:
                raise EngineError("the engine ended its stream before every choice was finished")
            while not self._cut and (frames := await self._stream.frames()):
                for frame in frames:  # usage, and the end that lets the connection be kept
                    self._read(frame)
        except RequestError as error:
            # vLLM names no field when it is the grammar that it cannot use.
            at_structure = error.param == "structured_outputs" or "rammar" in error.message
            if at_structure and self._structured is not None:
                error.param = self._structured.param  # as the client called it
            raise
        finally:
            self.cancel()

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the engine was sent."""
        return len(self.prompt_ids)

    @property
    def reasoning_tokens(self) -> int:
        """How many of the completion's tokens were reasoning."""
        return sum(reader.reasoning_tokens for reader in self._readers)

    def cancel(self) -> None:
        """Ends it now, wherever it is; the engine stops within a step."""
        if self._live:
            self._live = False
            self._inference._ended(self)
            self._stream.cancel()

    def _read(self, frame: dict[str, Any]) -> list[Delta]:
        usage = frame.get("usage")
        if usage and usage.get("prompt_tokens_details"):
            self.cached_tokens = usage["prompt_tokens_details"].get("cached_tokens") or 0
        deltas = []
        for choice in frame["choices"]:
            index = choice["index"]
            if index in self._open:
                deltas.append(self._read_choice(index, choice))
        return deltas

    def _read_choice(self, index: int, choice: dict[str, Any]) -> Delta:
        ids = choice["token_ids"] or []
        reason = choice["finish_reason"]
        reader = self._readers[index]
        self.completion_tokens += 0 if self._says_nothing else len(ids)
        if self._scored and not self.prompt_logprobs and choice.get("prompt_logprobs"):
            self._read_prompt_logprobs(choice["prompt_logprobs"])
        if self._says_nothing:
            self._open.discard(index)
            return Delta(index, "", "length", None if self._logprobs is None else [])
        told = ids[:-1] if reason == "stop" and ids and ids[-1] in self._client_stops else ids
        if self._logprobs is None or len(ids) == 1:
            part = reader.feed(told)
        else:  # one by one, to know which token meets a stop string
            part, told = self._feed_each(reader, told)
        if reader.stopped:
            reason = "stop"
            self._cut = True
        if reason is not None:
            part.add(reader.finish(at_stop=reason == "stop"))
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._read_logprobs(choice["logprobs"], told, ended=reason == "stop")
        if reason is not None:
            self._open.discard(index)
            if reason == "stop" and reader.n_calls:
                reason = "tool_calls"
        return Delta(index, part.text, reason, logprobs, part.reasoning, part.calls, ids)

    def _feed_each(self, reader: ReplyReader, ids: list[int]) -> tuple[Part, list[int]]:
        part = reader.feed(())
        for number, token_id in enumerate(ids, start=1):
            part.add(reader.feed((token_id,)))
            if reader.stopped:
                return part, ids[:number]
        return part, ids

    def _read_prompt_logprobs(self, raw: list[dict[str, dict[str, Any]] | None]) -> None:
        token_bytes = self._bundle.tokenizer.token_bytes
        for token_id, scores in list(zip(self.prompt_ids, raw, strict=True))[-self._scored :]:
            spelled = token_bytes(token_id)
            if scores is None:
                self.prompt_logprobs.append((spelled, None))
                continue
            likeliest = sorted(scores.items(), key=lambda item: -_finite(item[1]["logprob"]))[: self._logprobs or 0]
            top = [(token_bytes(int(name)), _finite(score["logprob"])) for name, score in likeliest]
            own = _finite(scores[str(token_id)]["logprob"])
            self.prompt_logprobs.append((spelled, TokenLogprob(spelled, own, top)))

    def _read_logprobs(self, raw: dict[str, Any] | None, ids: list[int], *, ended: bool) -> list[TokenLogprob]:
        """Entries for the tokens that are text: the stop token that ended the reply has none, as at OpenAI."""
        if raw is None:
            return []
        size = len(ids) - 1 if ended and ids and ids[-1] in self._stop_ids else len(ids)
        token_bytes = self._bundle.tokenizer.token_bytes
        entries = []
        tops = raw.get("top_logprobs") or [None] * len(ids)
        for token_id, logprob, top in zip(ids[:size], raw["token_logprobs"], tops, strict=False):
            others = sorted((top or {}).items(), key=lambda item: -_finite(item[1]))[: self._logprobs or 0]
            named = [(token_bytes(int(name.removeprefix("token_id:"))), _finite(value)) for name, value in others]
            entries.append(TokenLogprob(token_bytes(token_id), _finite(logprob), named))
        return entries


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


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or logprob < _LEAST_LOGPROB else logprob
