"""`/v1/completions`: the request read, and the bodies and frames that answer it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.chat import Usage, usage_body
from gateway.wire.fields import Body, show
from gateway.wire.sampling import SAMPLING_FIELDS, Sampling, parse_sampling, parse_stream

_KNOWN = SAMPLING_FIELDS | frozenset("prompt max_tokens logprobs echo suffix best_of user".split())
_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_PROMPT_LIMIT = 128


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked request; each prompt is a text or a list of token ids."""

    model: str
    prompts: list[str | list[int]]
    sampling: Sampling
    echo: bool
    stream: bool
    include_usage: bool


def parse(body: Body) -> CompletionRequest:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, _KNOWN)
    model = fields.required_string(body, "model", 1000)
    max_tokens = fields.integer(body, "max_tokens", 1, 2**31)
    logprobs = fields.integer(body, "logprobs", 0, 20)
    stream, include_usage = parse_stream(body)
    sampling = parse_sampling(
        body, max_tokens=_DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens, logprobs=logprobs
    )
    if body.get("suffix"):
        raise RequestError("'suffix' is not supported", param="suffix")
    best_of = fields.integer(body, "best_of", 1, 128)
    if best_of is not None and best_of != sampling.n:
        raise RequestError(f"'best_of' must equal 'n' ({sampling.n}) for now, not {best_of}", param="best_of")
    echo = fields.boolean(body, "echo") or False
    if echo and logprobs is not None:
        raise RequestError("'echo' together with 'logprobs' is not supported yet", param="echo")
    return CompletionRequest(model, _prompts(body), sampling, echo, stream, include_usage)


def _prompts(body: Body) -> list[str | list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_id(item) for item in prompt):
            return [prompt]
        if len(prompt) > _PROMPT_LIMIT:
            raise RequestError(f"'prompt' has {len(prompt)} entries; at most {_PROMPT_LIMIT} are taken", param="prompt")
        if all(isinstance(item, str) and item for item in prompt):
            return list(prompt)
        if all(isinstance(item, list) and item and all(_is_id(i) for i in item) for item in prompt):
            return list(prompt)
    raise RequestError(
        f"'prompt' must be a text, a list of texts, a list of token ids, or a list of such lists, none empty, "
        f"not {show(prompt)}",
        param="prompt",
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


@dataclass(frozen=True, slots=True)
class TextChoice:
    """A continuation, whole or the part that came now."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: list[tuple[str, float, dict[str, float]]] | None = None  # token, logprob, alternatives
    text_offset: int = 0  # characters before `text` in the whole


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
    offsets, at = [], choice.text_offset
    for token, _, _ in choice.logprobs:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": [token for token, _, _ in choice.logprobs],
        "token_logprobs": [logprob for _, logprob, _ in choice.logprobs],
        "top_logprobs": [top for _, _, top in choice.logprobs],
        "text_offset": offsets,
    }
