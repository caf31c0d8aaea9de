"""The one way to ask a model: resolve → render → generate → deltas. Chat and completions call it; none copies it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gateway.chat.bundle import Bundle
from gateway.chat.calls import CallDelta
from gateway.chat.conversation import Message, Options, RenderError
from gateway.chat.parse import ReplyReader
from gateway.chat.render import Prompt, render_prompt, render_quickly
from gateway.chat.speech import NO_TOOLS, ToolUse, call_opening
from gateway.engines.catalog import Catalog, Served
from gateway.engines.client import EngineStream
from gateway.errors import ContextLengthExceeded, EngineError, RateLimited, RequestError

# Rendering longer texts than this would hold up other streams for more than about a millisecond.
_INLINE_CHARACTERS = 4000
_LEAST_LOGPROB = -9999.0


__all__ = ["CallDelta", "Delta", "Generation", "Inference", "Sampling", "TokenLogprob"]


class Sampling(Protocol):
    """What is asked of the engine; `wire.sampling` reads it."""

    @property
    def n(self) -> int: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def stops(self) -> tuple[str, ...]: ...
    @property
    def logit_bias(self) -> dict[str, float]: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def ignore_eos(self) -> bool: ...
    @property
    def min_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A sampled token, what the model gave it, and the likeliest others (natural logarithms)."""

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


class Inference:
    """Renders and asks. Holds no state of a request."""

    def __init__(self, catalog: Catalog, requests_in_flight: int) -> None:
        self._catalog = catalog
        self._limit = requests_in_flight
        self.in_flight = 0

    async def chat(
        self,
        model: str,
        messages: Sequence[Message],
        sampling: Sampling,
        *,
        stream: bool,
        tool_use: ToolUse = NO_TOOLS,
        options: Options | None = None,
    ) -> Generation:
        """A reply to `messages`. Raises ModelNotFound, RequestError, ContextLengthExceeded, EngineUnavailable."""
        served = self._catalog.resolve(model)
        bundle = served.bundle
        if tool_use.tools and bundle.speech.tool_calls is None:
            raise RequestError(
                f"'{model}' speaks through the template '{bundle.template.name}', which has no form for tool calls that can "
                "be read back; leave 'tools' out or ask a model whose template has one",
                param="tools",
            )
        tools = tool_use.tools or None
        try:
            prompt = render_quickly(bundle, messages, tools, options)
            if prompt is None:
                prompt = await asyncio.to_thread(render_prompt, bundle, messages, tools, options)
        except RenderError as error:
            at_tools = tools and not getattr(bundle.template, "offers_tools", False)
            raise RequestError(f"{error}", param="tools" if at_tools else "messages") from error
        begun = _forced_ids(bundle, prompt, tool_use)

        def reader() -> ReplyReader:
            return ReplyReader(
                bundle, sampling.stops, tool_use=tool_use, opens_reasoning=prompt.opens_reasoning, begun=begun
            )

        by_text = bool(sampling.stops) or bool(bundle.stop_strings) or tool_use.single
        ids = [*prompt.ids, *begun] if begun else prompt.ids
        return await self._generate(served, ids, sampling, reader, stream=stream or by_text, param="messages")

    async def complete(self, model: str, prompt: str | list[int], sampling: Sampling, *, stream: bool) -> Generation:
        """A continuation of a text or of token ids. Raises as `chat` does."""
        served = self._catalog.resolve(model)
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

        by_text = bool(sampling.stops)
        return await self._generate(served, ids, sampling, reader, stream=stream or by_text, param="prompt")

    def prompt_text(self, model: str, prompt: str | list[int]) -> str:
        """A plain prompt as text, for `echo`."""
        return prompt if isinstance(prompt, str) else self._catalog.resolve(model).bundle.tokenizer.decode(prompt)

    async def _generate(
        self,
        served: Served,
        ids: list[int],
        sampling: Sampling,
        reader: Callable[[], ReplyReader],
        *,
        stream: bool,
        param: str,
    ) -> Generation:
        if self.in_flight >= self._limit:
            raise RateLimited(f"{self._limit} requests are being answered; try again shortly", retry_after_s=1)
        _check_bias(sampling.logit_bias, served.bundle.tokenizer.vocab_size)
        max_tokens = _room(served, ids, sampling.max_tokens, param)
        readers = [reader() for _ in range(sampling.n)]
        stop_ids = () if sampling.ignore_eos else served.bundle.stop_ids
        body = _engine_body(served, ids, sampling, max_tokens, stop_ids, stream=stream)
        self.in_flight += 1
        try:
            events = await served.client.stream(body)
        except BaseException:
            self.in_flight -= 1
            raise
        return Generation(self, served.bundle, events, readers, prompt_ids=ids, logprobs=sampling.logprobs)

    def _ended(self) -> None:
        self.in_flight -= 1


class Generation:
    """One answer under way: iterate `deltas()` to its end, or `cancel()` it."""

    def __init__(
        self,
        inference: Inference,
        bundle: Bundle,
        stream: EngineStream,
        readers: list[ReplyReader],
        *,
        prompt_ids: list[int],
        logprobs: int | None,
    ) -> None:
        self._inference, self._bundle, self._stream, self._readers = inference, bundle, stream, readers
        self._open = set(range(len(readers)))
        self._stop_ids = frozenset(bundle.stop_ids)
        self._logprobs = logprobs
        self._live = True
        self._cut = False  # a stop string ended a choice: the engine does not know and would go on
        self.plain = all(reader.plain for reader in readers)  # text is all that can come
        self.prompt_ids = prompt_ids
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
            self._inference._ended()
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
        self.completion_tokens += len(ids)
        part = reader.feed(ids)
        if reader.stopped:
            reason = "stop"
            self._cut = True
        if reason is not None:
            part.add(reader.finish(at_stop=reason == "stop"))
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._read_logprobs(choice["logprobs"], ids, ended=reason == "stop")
        if reason is not None:
            self._open.discard(index)
            if reason == "stop" and reader.n_calls:
                reason = "tool_calls"
        return Delta(index, part.text, reason, logprobs, part.reasoning, part.calls, ids)

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


def _forced_ids(bundle: Bundle, prompt: Prompt, tool_use: ToolUse) -> list[int]:
    """The beginning of a call, for a reply that must be one: it goes behind the prompt and counts as the reply's."""
    if not tool_use.forced:
        return []
    opening = call_opening(bundle.speech, tool_use.forced, in_reasoning=prompt.opens_reasoning, lead=bundle.frame.lead)
    return bundle.tokenizer.encode_continuation(opening)


def _room(served: Served, ids: list[int], wanted: int | None, param: str) -> int:
    """How many tokens may come after the prompt."""
    context = served.context_length
    room = context - len(ids)
    if room < 1 or (wanted is not None and wanted > room):
        asked = f"{len(ids)} in the {param}" + (f", {wanted} for the completion" if wanted is not None else "")
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. You asked for more ({asked}). "
            f"Please shorten the {param} or the completion.",
            param=param,
        )
    return room if wanted is None else wanted


def _check_bias(logit_bias: dict[str, float], vocab_size: int) -> None:
    for token_id in logit_bias:
        if int(token_id) >= vocab_size:
            raise RequestError(
                f"'logit_bias' holds the token id {token_id}, and the model has {vocab_size} tokens", param="logit_bias"
            )


def _engine_body(
    served: Served,
    ids: list[int],
    sampling: Sampling,
    max_tokens: int,
    stop_ids: tuple[int, ...],
    *,
    stream: bool,
) -> dict[str, Any]:
    """Every sampling field is said, since an engine's defaults are its own (vLLM's max_tokens is 16)."""
    body: dict[str, Any] = {
        "model": served.engine_model,
        "prompt": ids,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "n": sampling.n,
        "logprobs": sampling.logprobs,
        "stop_token_ids": stop_ids,
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens,
        "stream": stream,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "cache_salt": served.cache_salt,
    }
    if sampling.logit_bias:
        body["logit_bias"] = sampling.logit_bias
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or logprob < _LEAST_LOGPROB else logprob
