"""`/v1/completions`: the request read, and the bodies and frames that answer it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.chat import Usage, usage_body
from gateway.wire.fields import Body
from gateway.wire.sampling import SAMPLING_FIELDS, Sampling, parse_sampling, parse_stream

_KNOWN = SAMPLING_FIELDS | frozenset("prompt max_tokens logprobs echo suffix best_of user".split())
_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_PROMPT_LIMIT = 128


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked request; each prompt is a text or a list of token ids."""

    model: str
    prompts: list[str | list[int]]
    sampling: Sampling  # with the client's own n
    best_of: int  # how many are made for each prompt; the best n are given
    echo: bool
    stream: bool
    include_usage: bool


def parse(body: Body) -> CompletionRequest:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, _KNOWN)
    model = fields.required_string(body, "model", 1000)
    echo = fields.boolean(body, "echo") or False
    max_tokens = fields.integer(body, "max_tokens", 0, 2**31)
    if max_tokens == 0 and not echo:
        raise RequestError("'max_tokens' may be 0 only with \"echo\": true", param="max_tokens")
    logprobs = fields.integer(body, "logprobs", 0, 20)
    stream, include_usage = parse_stream(body)
    sampling = parse_sampling(
        body, max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens, logprobs=logprobs
    )
    if body.get("suffix"):
        raise RequestError("'suffix' is not supported", param="suffix")
    best_of = _best_of(body, sampling.n, stream=stream)
    return CompletionRequest(
        model, fields.texts_or_ids(body, "prompt", _PROMPT_LIMIT), sampling, best_of, echo, stream, include_usage
    )


def _best_of(body: Body, n: int, *, stream: bool) -> int:
    best_of = fields.integer(body, "best_of", 0, 128)
    if not best_of or best_of == n:
        return n
    if best_of < n:
        raise RequestError(f"'best_of' must be at least 'n' ({n}), not {best_of}", param="best_of")
    if stream:
        raise RequestError(
            "'best_of' above 'n' cannot be streamed: which are best is known at their end", param="best_of"
        )
    return best_of


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a text: the characters before it, its log-probability and the likeliest (None: nothing came before it)."""

    token: str
    text_offset: int
    logprob: float | None
    top: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A continuation, whole or the part that came now."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: list[ScoredToken] | None = None


def completion(reply_id: str, created: int, model: str, choices: Sequence[TextChoice], usage: Usage) -> bytes:
    """The `text_completion` object."""
    whole = _body(reply_id, created, model, choices)
    return orjson.dumps({**whole, "usage": usage_body(usage)})


def chunk(reply_id: str, created: int, model: str, choices: Sequence[TextChoice], *, include_usage: bool) -> bytes:
    """One server-sent event of a stream."""
    body = _body(reply_id, created, model, choices)
    return b"data: " + orjson.dumps({**body, "usage": None} if include_usage else body) + b"\n\n"


def usage_chunk(reply_id: str, created: int, model: str, usage: Usage) -> bytes:
    """The event after the last, when the client asked for usage."""
    return b"data: " + orjson.dumps({**_body(reply_id, created, model, []), "usage": usage_body(usage)}) + b"\n\n"


def _body(reply_id: str, created: int, model: str, choices: Sequence[TextChoice]) -> dict[str, Any]:
    return {
        "id": reply_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": _logprobs(choice),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ],
    }


def _logprobs(choice: TextChoice) -> dict[str, Any] | None:
    if choice.logprobs is None:
        return None
    return {
        "tokens": [scored.token for scored in choice.logprobs],
        "token_logprobs": [scored.logprob for scored in choice.logprobs],
        "top_logprobs": [scored.top for scored in choice.logprobs],
        "text_offset": [scored.text_offset for scored in choice.logprobs],
    }
