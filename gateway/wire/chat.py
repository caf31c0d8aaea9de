"""`/v1/chat/completions`: the request read, and the bodies and frames that answer it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.chat.calls import CallDelta
from gateway.chat.conversation import Message
from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body, show
from gateway.wire.messages import parse_messages
from gateway.wire.sampling import SAMPLING_FIELDS, Sampling, parse_sampling, parse_stream
from gateway.wire.stored_completions import stored_request
from gateway.wire.template_options import effort_options, template_options
from gateway.wire.tools import TOOL_FIELDS, ToolRequest, parse_tools

# Hints and bookkeeping that change no answer here: taken and left alone. `audio` says how speech is to sound, and text is
# all there is: other `modalities` are refused.
_IGNORED = frozenset(
    "metadata user store service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention "
    "verbosity prediction moderation audio".split()
)
_READ = frozenset(
    "messages max_tokens max_completion_tokens logprobs top_logprobs response_format modalities reasoning_effort "
    "chat_template_kwargs return_token_ids".split()
)
# What would change the answer and cannot be done yet: refused by name unless empty.
_REFUSED = {
    "web_search_options": "web search is not supported",
}
_KNOWN = SAMPLING_FIELDS | TOOL_FIELDS | _IGNORED | _READ | _REFUSED.keys()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request: every field has its type and is within its bounds."""

    model: str
    messages: list[Message]
    sampling: Sampling
    stream: bool
    include_usage: bool
    tools: ToolRequest
    options: dict[str, Any]  # for the template, by its own names
    return_token_ids: bool = False  # vLLM's extension: show what was sent to the engine and what it sent
    kept: dict[str, Any] | None = None  # what is stored beside the completion, where "store" asks for it


def parse(body: Body) -> ChatRequest:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, _KNOWN)
    model = fields.required_string(body, "model", 1000)
    _refuse_unsupported(body)
    most = fields.integer(body, "max_completion_tokens", 0, 2**31)  # 0: the prompt is read, and nothing is said
    older = fields.integer(body, "max_tokens", 0, 2**31)
    stream, include_usage = parse_stream(body)
    sampling = parse_sampling(body, max_tokens=most if most is not None else older, logprobs=_logprobs(body))
    tools = parse_tools(body)
    if tools.use.tools and sampling.structured is not None:
        name = sampling.structured.param
        raise RequestError(
            f"'{name}' holds the whole reply to a form, which leaves no room for a call of one of the 'tools'; leave them "
            'out or send "tool_choice": "none"',
            param=name,
        )
    messages, options = parse_messages(body), _options(body)
    token_ids = bool(fields.boolean(body, "return_token_ids"))
    kept = stored_request(body) if fields.boolean(body, "store") else None
    return ChatRequest(model, messages, sampling, stream, include_usage, tools, options, token_ids, kept)


def _refuse_unsupported(body: Body) -> None:
    for name, why in _REFUSED.items():
        if body.get(name):
            raise RequestError(f"'{name}': {why}", param=name)
    modalities = body.get("modalities")
    if modalities not in (None, ["text"]):
        raise RequestError(f"'modalities' must be [\"text\"], not {show(modalities)}", param="modalities")


def _options(body: Body) -> dict[str, Any]:
    """`reasoning_effort`, and vLLM's `chat_template_kwargs`: variables of a template, such as enable_thinking."""
    effort = effort_options(body.get("reasoning_effort"), "reasoning_effort")
    return effort | template_options(body.get("chat_template_kwargs"), "chat_template_kwargs")


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
    reasoning_tokens: int = 0


def usage_body(usage: Usage) -> dict[str, Any]:
    """Usage as both kinds of completion show it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
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
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()  # each whole
    token_ids: Sequence[int] = ()  # through the stop


def completion(
    reply_id: str,
    created: int,
    model: str,
    choices: Sequence[Choice],
    usage: Usage,
    *,
    older: bool = False,
    prompt_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The `chat.completion` object. `older`: a call is told as `function_call`. With `prompt_ids` all ids are shown."""
    shown: list[dict[str, Any]] = [
        {
            "index": index,
            "message": _reply(choice, older=older),
            "logprobs": None if choice.logprobs is None else {"content": choice.logprobs, "refusal": None},
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(choices)
    ]
    body: dict[str, Any] = {
        "id": reply_id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": shown,
        "usage": usage_body(usage),
        "service_tier": "default",
        "system_fingerprint": None,
    }
    if prompt_ids is not None:
        body["prompt_token_ids"] = prompt_ids
        for choice, whole in zip(shown, choices, strict=True):
            choice["token_ids"] = whole.token_ids
    return body


def _reply(choice: Choice, *, older: bool) -> dict[str, Any]:
    said = choice.text if choice.text or not choice.calls else None
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None, "annotations": []}
    if choice.reasoning:
        message["reasoning_content"] = message["reasoning"] = choice.reasoning
    called = [{"name": call.name, "arguments": "".join(call.arguments)} for call in choice.calls]
    if called and older:
        message["function_call"] = called[0]
    elif called:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": function}
            for call, function in zip(choice.calls, called, strict=True)
        ]
    return message


class ChunkWriter:
    """Writes `chat.completion.chunk` frames; all that is constant in a stream is written once."""

    def __init__(self, reply_id: str, created: int, model: str, *, include_usage: bool) -> None:
        head = orjson.dumps({"id": reply_id, "object": "chat.completion.chunk", "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"service_tier":"default","system_fingerprint":null,"choices":['
        usage = b',"usage":null' if include_usage else b""
        self._tail = b"]" + usage + b"}\n\n"
        self._text_head = self._head + b'{"index":0,"delta":{"content":'
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def role(self, index: int, *, content: bytes = b'""') -> bytes:
        """The first frame of a choice; `content` is null where it may have none."""
        delta = b',"refusal":null},"logprobs":null,"finish_reason":null}'
        role = b',"delta":{"role":"assistant","content":'
        return self._head + b'{"index":%d' % index + role + content + delta + self._tail

    def text(self, index: int, text: str | None, logprobs: list[dict[str, Any]] | None = None) -> bytes:
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

    def prompt_ids(self, ids: Sequence[int]) -> bytes:
        """A frame of its own before all others, for a client that asked for ids."""
        body = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":null}'
        return self._head + body + b'],"prompt_token_ids":' + orjson.dumps(ids) + self._tail[1:]

    def ids(self, index: int, ids: Sequence[int]) -> bytes:
        """A frame with the ids that the frames after it are read from."""
        body = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None, "token_ids": ids}
        return self._head + orjson.dumps(body) + self._tail

    def reasoning(self, index: int, text: str) -> bytes:
        return self._delta(index, {"reasoning_content": text, "reasoning": text})

    def call(self, index: int, call: CallDelta) -> bytes:
        """More of a tool call: its id, type and name with the first frame only."""
        arguments = "".join(call.arguments)
        if call.name is None:
            return self._delta(index, {"tool_calls": [{"index": call.index, "function": {"arguments": arguments}}]})
        function = {"name": call.name, "arguments": arguments}
        whole = {"index": call.index, "id": call.id, "type": "function", "function": function}
        return self._delta(index, {"tool_calls": [whole]})

    def function_call(self, index: int, call: CallDelta) -> bytes:
        """The same, as it was told before there were tools."""
        name = {} if call.name is None else {"name": call.name}
        return self._delta(index, {"function_call": {**name, "arguments": "".join(call.arguments)}})

    def _delta(self, index: int, delta: dict[str, Any]) -> bytes:
        body = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._head + orjson.dumps(body) + self._tail

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
