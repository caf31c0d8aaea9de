"""Requests that are passed on to an upstream: which fields may go. Pure; what the fields hold is the upstream's to judge."""

from __future__ import annotations

from typing import Any

from gateway.errors import RequestError

_SAMPLING = (
    "model seed stop stream stream_options temperature top_p frequency_penalty presence_penalty logit_bias logprobs n "
    "max_tokens user metadata safety_identifier prompt_cache_key "
    # vLLM's, which many servers know
    "top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids structured_outputs return_token_ids"
)
FIELDS = {
    "/chat/completions": frozenset(
        (
            f"{_SAMPLING} messages audio modalities function_call functions max_completion_tokens parallel_tool_calls "
            "prediction prompt_cache_options prompt_cache_retention reasoning_effort response_format service_tier store "
            "tool_choice tools top_logprobs verbosity web_search_options moderation chat_template_kwargs"
        ).split()
    ),
    "/completions": frozenset(f"{_SAMPLING} prompt best_of echo suffix".split()),
    "/embeddings": frozenset("model input dimensions encoding_format user".split()),
}


def check(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body as it may be passed on. RequestError names a field that may not."""
    if unknown := sorted(body.keys() - FIELDS[path]):
        raise RequestError(
            f"Unrecognized request argument supplied: {unknown[0][:100]}. It is not passed on to the server that answers for "
            "this model.",
            param=unknown[0][:100],
        )
    return body
