"""The engine dialect as bytes: a request body → a `Completion`, results → frames. Pure; runs on the HTTP thread.

Its rule: every value is checked, by type and by range, before anything is allocated for it, and the error names the field.
Fields that it does not know are ignored, as vLLM does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import ContextLengthExceeded, RequestError
from gateway.llama_worker.fields import Limits, boolean, ids, integer, number, optional_integer, show, text
from gateway.llama_worker.sampling import Sampling
from gateway.llama_worker.scoring import Score
from gateway.llama_worker.structured.compiler import Wish, read_wish

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_IDS = 256
MAX_SALT = 256
DONE = b"data: [DONE]\n\n"
_PLAIN_FRAME = b'%d,"text":"","logprobs":null,"finish_reason":null,"stop_reason":null,"token_ids":[%d]}]}\n\n'


@dataclass(frozen=True)
class Completion:
    """A valid request for one or more continuations of a prompt."""

    model: str
    prompt_ids: list[int]
    sampling: Sampling
    n: int
    logprobs: int | None  # how many of the likeliest tokens come beside the chosen one
    prompt_logprobs: int | None
    stream: bool
    include_usage: bool
    wish: Wish | None = None  # what the text is to look like; compiled, it is `sampling.structure`
    cache_salt: str = ""  # prompts share computed prefixes with those of the same salt only


@dataclass
class Choice:
    """What one sequence produced: in this step (streaming) or in all (unary)."""

    index: int
    ids: list[int]
    scores: list[Score]
    finish_reason: str | None = None
    stop_reason: int | None = None


def parse_completion(fields: dict[str, Any], limits: Limits) -> Completion:
    """The request in `fields`; RequestError with its `param` when a value breaks a rule."""
    prompt_ids = _prompt(fields, limits)
    max_tokens = integer(fields, "max_tokens", 16, 1, None)
    if len(prompt_ids) + max_tokens > limits.max_model_len:
        raise ContextLengthExceeded(
            f"The prompt has {len(prompt_ids)} tokens and max_tokens is {max_tokens}, {len(prompt_ids) + max_tokens} "
            f"together; this model's context holds {limits.max_model_len}. Shorten the prompt or lower max_tokens.",
            param="prompt" if len(prompt_ids) >= limits.max_model_len else "max_tokens",
        )
    min_tokens = integer(fields, "min_tokens", 0, 0, max_tokens)
    top_k = integer(fields, "top_k", 0, -1, None)
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=number(fields, "temperature", 1.0, 0.0, 100.0),
        top_p=number(fields, "top_p", 1.0, 0.0, 1.0, above_low=True),
        top_k=max(0, top_k),
        min_p=number(fields, "min_p", 0.0, 0.0, 1.0),
        presence_penalty=number(fields, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=number(fields, "frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=number(fields, "repetition_penalty", 1.0, 0.0, 100.0, above_low=True),
        seed=_seed(fields),
        stop_ids=frozenset(ids(fields.get("stop_token_ids"), "stop_token_ids", limits, MAX_STOP_IDS)),
        ignore_eos=boolean(fields, "ignore_eos"),
        min_tokens=min_tokens,
        logit_bias=_logit_bias(fields.get("logit_bias"), limits),
    )
    stream = boolean(fields, "stream")
    prompt_logprobs = optional_integer(fields, "prompt_logprobs", 0, MAX_LOGPROBS)
    if stream and prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed; ask without stream.", param="prompt_logprobs")
    return Completion(
        model=text(fields, "model"),
        prompt_ids=prompt_ids,
        sampling=sampling,
        n=integer(fields, "n", 1, 1, limits.max_num_seqs),
        logprobs=optional_integer(fields, "logprobs", 0, MAX_LOGPROBS),
        prompt_logprobs=prompt_logprobs,
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options")),
        wish=read_wish(fields.get("structured_outputs")),
        cache_salt=_cache_salt(fields.get("cache_salt")),
    )


def parse_adapter(fields: dict[str, Any]) -> tuple[str, str | None]:
    """(lora_name, lora_path or None) of a load or unload request."""
    path = fields.get("lora_path")
    if path is not None and not isinstance(path, str):
        raise RequestError(f"lora_path is {show(path)}; it must be a string.", param="lora_path")
    return text(fields, "lora_name"), path


class Reply:
    """The bodies of one completion: what stays the same in them is kept here."""

    def __init__(self, request_id: str, request: Completion) -> None:
        self._head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._request = request
        self._frame_head = b"data: " + orjson.dumps({**self._head, "choices": []}).removesuffix(b"]}") + b'{"index":'

    def frame(self, choice: Choice) -> bytes:
        """One SSE frame: what one sequence produced in one step."""
        if self._request.logprobs is None and choice.finish_reason is None and len(choice.ids) == 1:
            # Nearly every frame: the same but for two numbers.
            return self._frame_head + _PLAIN_FRAME % (choice.index, choice.ids[0])
        return b"data: " + orjson.dumps({**self._head, "choices": [self._choice(choice)]}) + b"\n\n"

    def usage_frame(self, completion_tokens: int, cached_tokens: int) -> bytes:
        """The frame before `[DONE]` when usage was asked for."""
        usage = self._usage(completion_tokens, cached_tokens)
        return b"data: " + orjson.dumps({**self._head, "choices": [], "usage": usage}) + b"\n\n"

    def body(self, choices: Sequence[Choice], prompt_scores: list[Score] | None, cached_tokens: int) -> bytes:
        """The whole unary response."""
        listed = []
        for choice in choices:
            entry = self._choice(choice)
            entry["prompt_token_ids"] = self._request.prompt_ids
            entry["prompt_logprobs"] = None if prompt_scores is None else [None, *map(_prompt_entry, prompt_scores)]
            listed.append(entry)
        usage = self._usage(sum(len(choice.ids) for choice in choices), cached_tokens)
        return orjson.dumps({**self._head, "choices": listed, "usage": usage})

    def _choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": "",
            "logprobs": None if self._request.logprobs is None else _logprobs(choice.scores),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "token_ids": choice.ids,
        }

    def _usage(self, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
        prompt_tokens = len(self._request.prompt_ids)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }


def _logprobs(scores: list[Score]) -> dict[str, Any]:
    return {
        "tokens": [f"token_id:{score.token}" for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            {f"token_id:{token}": value for token, value in [(score.token, score.logprob), *score.top]}
            for score in scores
        ],
        "text_offset": [],
    }


def _prompt_entry(score: Score) -> dict[str, Any]:
    entry = {str(score.token): {"logprob": score.logprob, "rank": score.rank, "decoded_token": None}}
    for rank, (token, value) in enumerate(score.top, start=1):
        entry.setdefault(str(token), {"logprob": value, "rank": rank, "decoded_token": None})
    return entry


def _prompt(fields: dict[str, Any], limits: Limits) -> list[int]:
    prompt = fields.get("prompt")
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(f"prompt is {show(prompt)}; it must be a list of one or more token ids.", param="prompt")
    if len(prompt) >= limits.max_model_len:
        raise ContextLengthExceeded(
            f"The prompt has {len(prompt)} tokens; this model's context holds {limits.max_model_len}, the reply "
            "included. Shorten the prompt.",
            param="prompt",
        )
    return ids(prompt, "prompt", limits, limits.max_model_len)


def _logit_bias(value: object, limits: Limits) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias is {show(value)}; it must map at most {MAX_LOGIT_BIAS} token ids to numbers.",
            param="logit_bias",
        )
    bias = {}
    for key, given in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < limits.vocab_size):
            raise RequestError(
                f"logit_bias has the key {show(key)}; a token id of this model is from 0 to {limits.vocab_size - 1}.",
                param="logit_bias",
            )
        bias[int(key)] = number({"logit_bias": given}, "logit_bias", 0.0, -100.0, 100.0)
    return bias


def _seed(fields: dict[str, Any]) -> int | None:
    value = fields.get("seed")
    if value is None:
        return None
    if type(value) is not int or not -(2**63) <= value < 2**64:
        raise RequestError(f"seed is {show(value)}; it must be a 64-bit integer.", param="seed")
    return value % 2**64


def _cache_salt(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not value or len(value) > MAX_SALT:
        rule = f"it must be a string of 1 to {MAX_SALT} characters"
        raise RequestError(f"cache_salt is {show(value)}; {rule}.", param="cache_salt")
    return value


def _include_usage(options: object) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RequestError(f"stream_options is {show(options)}; it must be an object.", param="stream_options")
    return boolean(options, "include_usage")
