"""`/v1/chat/completions`: the request read, and the bodies and frames that answer it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.chat.conversation import Message
from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body, show
from gateway.wire.sampling import SAMPLING_FIELDS, Sampling, parse_sampling, parse_stream

# Hints and bookkeeping that change no answer here: taken and left alone.
_IGNORED = frozenset(
    "metadata user store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention "
    "reasoning_effort verbosity prediction moderation parallel_tool_calls".split()
)
_READ = frozenset("messages max_tokens max_completion_tokens logprobs top_logprobs response_format modalities".split())
# What would change the answer and cannot be done yet: refused by name unless empty.
_REFUSED = {
    "tools": "tools are not supported yet",
    "functions": "functions are not supported yet",
    "function_call": "functions are not supported yet",
    "audio": "audio output is not supported",
    "web_search_options": "web search is not supported",
}
_KNOWN = SAMPLING_FIELDS | _IGNORED | _READ | _REFUSED.keys() | {"tool_choice"}
_MESSAGE_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request: every field has its type and is within its bounds."""

    model: str
    messages: list[Message]
    sampling: Sampling
    stream: bool
    include_usage: bool


def parse(body: Body) -> ChatRequest:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, _KNOWN)
    model = fields.required_string(body, "model", 1000)
    _refuse_unsupported(body)
    most = fields.integer(body, "max_completion_tokens", 1, 2**31)
    older = fields.integer(body, "max_tokens", 1, 2**31)
    stream, include_usage = parse_stream(body)
    sampling = parse_sampling(body, max_tokens=most if most is not None else older, logprobs=_logprobs(body))
    return ChatRequest(model, _messages(body), sampling, stream, include_usage)


def _messages(body: Body) -> list[Message]:
    raw = body.get("messages")
    if not isinstance(raw, list) or not raw:
        raise RequestError(f"'messages' must be a list with at least one message, not {show(raw)}", param="messages")
    if len(raw) > _MESSAGE_LIMIT:
        raise RequestError(f"'messages' has {len(raw)} entries; at most {_MESSAGE_LIMIT} are taken", param="messages")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(raw)]


def _message(raw: Any, where: str) -> Message:
    if not isinstance(raw, dict):
        raise RequestError(f"'{where}' must be an object with role and content, not {show(raw)}", param=where)
    role, content = raw.get("role"), raw.get("content")
    if role == "developer":
        role = "system"
    if role in ("tool", "function") or raw.get("tool_calls") or raw.get("function_call"):
        raise RequestError(f"'{where}' holds a tool call or its result; tools are not supported yet", param=where)
    if role not in ("system", "user", "assistant"):
        raise RequestError(
            f"'{where}.role' must be one of system, developer, user, assistant, not {show(role)}", param=f"{where}.role"
        )
    if isinstance(content, str):
        return Message(role, content)
    if isinstance(content, list):
        return Message(role, "".join(_part(part, f"{where}.content[{n}]") for n, part in enumerate(content)))
    if content is None and role == "assistant" and isinstance(raw.get("refusal"), str):
        return Message(role, raw["refusal"])
    raise RequestError(
        f"'{where}.content' must be a string or a list of parts, not {show(content)}", param=f"{where}.content"
    )


def _part(raw: Any, where: str) -> str:
    kind = raw.get("type") if isinstance(raw, dict) else None
    text = raw.get("text" if kind == "text" else "refusal") if isinstance(raw, dict) else None
    if kind in ("text", "refusal") and isinstance(text, str):
        return text
    if kind in ("text", "refusal") or kind is None:
        raise RequestError(f'\'{where}\' must be {{"type": "text", "text": …}}, not {show(raw)}', param=where)
    raise RequestError(f"'{where}.type' is {show(kind)}; only text is supported", param=f"{where}.type")


def _refuse_unsupported(body: Body) -> None:
    for name, why in _REFUSED.items():
        if body.get(name):
            raise RequestError(f"'{name}': {why}", param=name)
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise RequestError("'tool_choice': tools are not supported yet", param="tool_choice")
    modalities = body.get("modalities")
    if modalities not in (None, ["text"]):
        raise RequestError(f"'modalities' must be [\"text\"], not {show(modalities)}", param="modalities")
    response_format = body.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        raise RequestError(
            f'\'response_format\' must be {{"type": "text"}}, not {show(response_format)}: '
            "structured outputs are not supported yet",
            param="response_format",
        )


def _logprobs(body: Body) -> int | None:
    wanted = fields.boolean(body, "logprobs")
    top = fields.integer(body, "top_logprobs", 0, 20)
    if top is not None and not wanted:
        raise RequestError("'top_logprobs' is only taken together with \"logprobs\": true", param="top_logprobs")
    return (top or 0) if wanted else None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


def usage_body(usage: Usage) -> dict[str, Any]:
    """Usage as both kinds of completion show it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


@dataclass(frozen=True, slots=True)
class Choice:
    """A whole reply."""

    text: str
    finish_reason: str
    logprobs: list[dict[str, Any]] | None


def completion(reply_id: str, created: int, model: str, choices: Sequence[Choice], usage: Usage) -> bytes:
    """The `chat.completion` object."""
    return orjson.dumps(
        {
            "id": reply_id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
                    "logprobs": None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None},
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage_body(usage),
            "service_tier": "default",
            "system_fingerprint": None,
        }
    )


class ChunkWriter:
    """Writes `chat.completion.chunk` frames; all that is constant in a stream is written once."""

    def __init__(self, reply_id: str, created: int, model: str, *, include_usage: bool) -> None:
        head = orjson.dumps({"id": reply_id, "object": "chat.completion.chunk", "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"service_tier":"default","system_fingerprint":null,"choices":['
        usage = b',"usage":null' if include_usage else b""
        self._tail = b"]" + usage + b"}\n\n"
        self._text_head = self._head + b'{"index":0,"delta":{"content":'
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def role(self, index: int) -> bytes:
        """The first frame of a choice."""
        delta = b',"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}'
        return self._head + b'{"index":%d' % index + delta + self._tail

    def text(self, index: int, text: str, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        if index == 0 and logprobs is None:
            return self._text_head + orjson.dumps(text) + self._text_tail
        content = b"null" if logprobs is None else orjson.dumps({"content": logprobs, "refusal": None})
        return (
            self._head
            + b'{"index":%d,"delta":{"content":' % index
            + orjson.dumps(text)
            + b'},"logprobs":'
            + content
            + b',"finish_reason":null}'
            + self._tail
        )

    def finish(self, index: int, reason: str) -> bytes:
        """The last frame of a choice."""
        return (
            self._head
            + b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}' % (index, reason.encode())
            + self._tail
        )

    def usage(self, usage: Usage) -> bytes:
        """The frame after the last, with no choices, when the client asked for usage."""
        return self._head + b'],"usage":' + orjson.dumps(usage_body(usage)) + b"}\n\n"


def token_logprob(token: bytes, logprob: float, top: Sequence[tuple[bytes, float]]) -> dict[str, Any]:
    """One entry of `logprobs.content`."""
    return {
        **_token(token, logprob),
        "top_logprobs": [_token(other, other_logprob) for other, other_logprob in top],
    }


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}
