"""A reply under way: the engine's frames → deltas of its choices, and the counting of its tokens.

Place in the flow: made by `inference`, iterated by the routes. Its one rule: it ends once, whoever ends it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.access import Caller
from gateway.chat.calls import CallDelta
from gateway.chat.parse import Part, ReplyReader
from gateway.engine_request import Sampling, Structured
from gateway.engines.catalog import Served
from gateway.engines.client import EngineStream
from gateway.errors import EngineError, RequestError

_LEAST_LOGPROB = -9999.0


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


class Generation:
    """One answer under way: iterate `deltas()` to its end, or `cancel()` it."""

    def __init__(
        self,
        ended: Callable[[Generation], None],
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
        """`ended` is called once, at its end or when it is cancelled.

        `scored`: how many of the prompt's last ids have log-probabilities to come.
        """
        bundle = served.bundle
        self._ended, self._bundle, self._stream, self._readers = ended, bundle, stream, readers
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
            self._ended(self)
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


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or logprob < _LEAST_LOGPROB else logprob
