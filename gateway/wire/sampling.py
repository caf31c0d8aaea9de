"""How a reply is sampled: the fields that chat and plain completions share."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body
from gateway.wire.structured import Structured, parse_structured

SAMPLING_FIELDS = frozenset(
    "model n temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed stop logit_bias "
    "stream stream_options ignore_eos min_tokens stop_token_ids structured_outputs".split()
)
_SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class Sampling:
    """Defaults are OpenAI's. What vLLM added: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids."""

    n: int = 1
    max_tokens: int | None = None  # None: what the context leaves
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logit_bias: dict[str, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many alternatives to report; None: no logprobs
    ignore_eos: bool = False
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    structured: Structured | None = None


def parse_sampling(
    body: Body, *, max_tokens: int | None, logprobs: int | None, structured: Structured | None = None
) -> Sampling:
    """`structured` is what the reply is held to, where the body does not say it in chat's own fields."""
    top_p = fields.number(body, "top_p", 0, 1)
    if top_p == 0:
        top_p = 1e-9  # OpenAI takes 0 for "only the most likely"
    temperature = fields.number(body, "temperature", 0, 2)
    repetition = fields.number(body, "repetition_penalty", 0, 2)
    if repetition == 0:
        raise RequestError("'repetition_penalty' must be above 0; 1 is off", param="repetition_penalty")
    return Sampling(
        n=fields.integer(body, "n", 1, 128) or 1,
        max_tokens=max_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(fields.integer(body, "top_k", -1, 1_000_000) or 0, 0),
        min_p=fields.number(body, "min_p", 0, 1) or 0.0,
        presence_penalty=fields.number(body, "presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number(body, "frequency_penalty", -2, 2) or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        seed=fields.integer(body, "seed", -_SEED_LIMIT, _SEED_LIMIT - 1),
        stops=fields.stops(body),
        logit_bias=fields.logit_bias(body),
        logprobs=logprobs,
        ignore_eos=fields.boolean(body, "ignore_eos") or False,
        min_tokens=fields.integer(body, "min_tokens", 0, 1_000_000) or 0,
        stop_token_ids=fields.token_ids(body, "stop_token_ids", 64),
        structured=structured or parse_structured(body),
    )


def parse_stream(body: Body) -> tuple[bool, bool]:
    """(stream, include_usage)"""
    stream = fields.boolean(body, "stream") or False
    options = body.get("stream_options")
    if options is None:
        return stream, False
    if not isinstance(options, dict):
        raise RequestError("'stream_options' must be an object", param="stream_options")
    fields.refuse_unknown(options, {"include_usage", "include_obfuscation"})
    include_usage = fields.boolean(options, "include_usage") or False
    return stream, stream and include_usage  # a whole reply tells it anyway
