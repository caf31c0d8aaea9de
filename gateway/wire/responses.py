"""`/v1/responses`: the request read, and the object that answers it. Pure; its events are in `response_events`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.chat import Usage
from gateway.wire.fields import Body, show
from gateway.wire.metadata import parse_metadata
from gateway.wire.response_items import Item, parse_input
from gateway.wire.sampling import Sampling, parse_sampling
from gateway.wire.structured import parse_text_format
from gateway.wire.template_options import effort_options
from gateway.wire.tools import ToolRequest, parse_tools

# Hints and bookkeeping that change no answer here: taken, shown again, and left alone.
_IGNORED = frozenset(
    "user service_tier safety_identifier prompt_cache_key prompt_cache_options prompt_cache_retention max_tool_calls "
    "moderation access_programs image".split()
)
_READ = frozenset(
    "model input instructions background store stream stream_options include max_output_tokens metadata previous_response_id "
    "reasoning temperature text tool_choice tools parallel_tool_calls top_logprobs top_p truncation personality".split()
)
# What would change the answer and cannot be done: refused by name unless empty.
_REFUSED = {
    "conversation": "conversations are not kept by this server; chain responses with 'previous_response_id'",
    "prompt": "prompts are not kept by this server; send 'instructions' and 'input'",
    "context_management": "use 'truncation' or /v1/responses/compact",
}
_KNOWN = _IGNORED | _READ | _REFUSED.keys()
_LOGPROBS = "message.output_text.logprobs"


@dataclass(frozen=True, slots=True)
class ResponseRequest:
    """A checked request. `echo` is the fields of the response that say what was asked."""

    model: str
    items: list[Item]
    instructions: str | None
    previous_response_id: str | None
    sampling: Sampling
    tools: ToolRequest
    options: dict[str, Any]  # for the template, by its own names
    store: bool
    stream: bool
    background: bool
    truncates: bool
    echo: dict[str, Any]


def parse(body: Body) -> ResponseRequest:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, _KNOWN)
    for name, why in _REFUSED.items():
        if body.get(name):
            raise RequestError(f"'{name}': {why}", param=name)
    model = fields.required_string(body, "model", 1000)
    store, background = fields.boolean(body, "store") is not False, bool(fields.boolean(body, "background"))
    if background and not store:
        raise RequestError("'background' needs the response to be stored; leave \"store\": false out", param="store")
    truncation = body.get("truncation")
    if truncation not in (None, "auto", "disabled"):
        raise RequestError(f"'truncation' must be auto or disabled, not {show(truncation)}", param="truncation")
    tools = _tools(body)
    sampling = parse_sampling(
        {name: body[name] for name in ("temperature", "top_p") if name in body},
        max_tokens=fields.integer(body, "max_output_tokens", 1, 2**31),
        logprobs=_logprobs(body),
        structured=parse_text_format(_text(body).get("format")),
    )
    if tools.use.tools and sampling.structured is not None:
        raise RequestError(
            "'text.format' holds the whole reply to a form, which leaves no room for a call of one of the 'tools'; leave "
            'them out or send "tool_choice": "none"',
            param="text.format",
        )
    return ResponseRequest(
        model=model,
        items=parse_input(body.get("input")),
        instructions=_instructions(body),
        previous_response_id=fields.string(body, "previous_response_id", 200) or None,
        sampling=sampling,
        tools=tools,
        options=_options(body),
        store=store,
        stream=bool(fields.boolean(body, "stream")),
        background=background,
        truncates=truncation == "auto",
        echo=_echo(body, sampling, background=background, store=store),
    )


def response_object(
    response_id: str,
    created_at: int,
    request: ResponseRequest,
    *,
    status: str,
    output: Iterable[Item] = (),
    usage: Usage | None = None,
    completed_at: int | None = None,
    error: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `response`. An incomplete one ran into its `max_output_tokens`, or the end of its model's context."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "status": status,
        "completed_at": completed_at,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": request.model,
        "output": list(output),
        "usage": None if usage is None else _usage(usage),
        **request.echo,
    }


def compacted_object(response_id: str, created_at: int, output: Iterable[Item], usage: Usage) -> dict[str, Any]:
    """The `response.compaction`."""
    return {
        "id": response_id,
        "object": "response.compaction",
        "created_at": created_at,
        "output": list(output),
        "usage": _usage(usage),
    }


def error_object(message: str, *, param: str | None = None, by_client: bool = False) -> dict[str, Any]:
    """What a failed response says of its failure; OpenAI's codes are few."""
    return {"code": "invalid_prompt" if by_client else "server_error", "message": message, "param": param}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _echo(body: Body, sampling: Sampling, *, background: bool, store: bool) -> dict[str, Any]:
    reasoning = _object(body, "reasoning")
    text = _text(body)
    shown = {name: body[name] for name in sorted(_IGNORED - {"image", "moderation", "access_programs"}) if name in body}
    if shown.get("service_tier", "auto") == "auto":
        shown["service_tier"] = "default"
    if shown.get("prompt_cache_options") is not None:
        del shown["prompt_cache_options"]  # whose answer would claim a lifetime that nothing here keeps
    return {
        "background": background,
        "instructions": body.get("instructions"),
        "max_output_tokens": sampling.max_tokens,
        "metadata": parse_metadata(body.get("metadata")) or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "store": store,
        "temperature": sampling.temperature,
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [
            {"strict": False, "parameters": None, "description": None, **tool} for tool in body.get("tools") or ()
        ],
        "top_logprobs": sampling.logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": body.get("truncation") or "disabled",
        "user": None,
        **shown,
    }


def _tools(body: Body) -> ToolRequest:
    """Function tools, whose fields lie flat here, read as those of chat; what is wrong is named as it was sent."""
    raw, choice = body.get("tools"), body.get("tool_choice")
    tools = [_nested(tool) for tool in raw] if isinstance(raw, list) else raw
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        choice = {**choice, "tools": [_nested(tool) for tool in listed] if isinstance(listed, list) else listed}
    chat = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": body.get("parallel_tool_calls")}
    try:
        return parse_tools(chat)
    except RequestError as error:
        if error.param is not None and error.param.startswith("tools["):
            flat = error.param.replace("].function", "]")
            raise RequestError(error.message.replace(error.param, flat), param=flat) from error
        raise


def _nested(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if name in tool}}


def _logprobs(body: Body) -> int | None:
    top = fields.integer(body, "top_logprobs", 0, 20)
    include = body.get("include")
    if include is not None and not (isinstance(include, list) and all(isinstance(name, str) for name in include)):
        raise RequestError(f"'include' must be a list of strings, not {show(include)}", param="include")
    return (top or 0) if top or _LOGPROBS in (include or ()) else None


def _options(body: Body) -> dict[str, Any]:
    reasoning = _object(body, "reasoning")
    return effort_options(reasoning.get("effort"), "reasoning.effort")


def _instructions(body: Body) -> str | None:
    return fields.string(body, "instructions", 1_000_000) or None


def _text(body: Body) -> dict[str, Any]:
    return _object(body, "text")


def _object(body: Body, name: str) -> dict[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"'{name}' must be an object, not {show(value)}", param=name)
    return value or {}
