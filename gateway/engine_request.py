"""A request as an engine is asked it: how to sample, held against the model, as a body of the dialect. For `inference`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gateway.engines.catalog import Served
from gateway.errors import ContextLengthExceeded, RequestError


class Structured(Protocol):
    """What the engine is to hold a reply to; `wire.structured` reads it."""

    @property
    def kind(self) -> str: ...
    @property
    def value(self) -> Any: ...
    @property
    def param(self) -> str: ...


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
    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...
    @property
    def structured(self) -> Structured | None: ...


def engine_body(
    served: Served,
    ids: list[int],
    sampling: Sampling,
    told: Mapping[str, Any],
    *,
    stream: bool,
    param: str,
    cache_salt: str,
) -> dict[str, Any]:
    """The body for the engine; `told` is what it says of itself, `param` the client's name of the prompt, `cache_salt` the
    caller's and never a client's.

    Every sampling field is said, since an engine's defaults are its own (vLLM's max_tokens is 16). Raises RequestError.
    """
    vocab_size = served.bundle.tokenizer.vocab_size
    _check_ids(map(int, sampling.logit_bias), vocab_size, "logit_bias")
    _check_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    context = min(served.context_length, told.get("max_model_len") or served.context_length)
    max_tokens = _room(context, ids, sampling.max_tokens, param)
    stop_ids = () if sampling.ignore_eos else served.bundle.stop_ids
    body: dict[str, Any] = {
        "model": served.engine_model,
        "prompt": ids,
        "max_tokens": max(max_tokens, 1),  # 0 is asked for by who wants the prompt's scores alone
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
        "stop_token_ids": [*stop_ids, *sampling.stop_token_ids],
        "ignore_eos": sampling.ignore_eos,
        "min_tokens": sampling.min_tokens,
        "stream": stream,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "cache_salt": cache_salt,
    }
    if sampling.logit_bias:
        body["logit_bias"] = sampling.logit_bias
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def structured_field(structured: Structured, base: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """`structured_outputs` of the dialect. RequestError where an engine that tells of itself does not tell of this."""
    if told and structured.kind not in (told.get("structured_outputs") or ()):
        raise RequestError(
            f"'{structured.param}': the engine of '{base}' cannot hold a reply to {structured.kind}; leave it out, "
            "or restart the engine if it is older than this server",
            param=structured.param,
        )
    return {structured.kind: structured.value}


def _room(context: int, ids: list[int], wanted: int | None, param: str) -> int:
    """How many tokens may come after the prompt."""
    room = context - len(ids)
    if room < 1 or (wanted is not None and wanted > room):
        asked = f"{len(ids)} in the {param}" + (f", {wanted} for the completion" if wanted is not None else "")
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context} tokens. You asked for more ({asked}). "
            f"Please shorten the {param} or the completion.",
            param=param,
        )
    return room if wanted is None else wanted


def _check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    for token_id in ids:
        if token_id >= vocab_size:
            raise RequestError(
                f"'{param}' holds the token id {token_id}, and the model has {vocab_size} tokens", param=param
            )
