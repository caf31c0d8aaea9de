"""One request of a batch: put to the gateway's own application, as if it had come in at the front, and its answer kept.

So a batch is answered by the very code that answers everybody, whatever its endpoint is.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.access import Caller
from gateway.batches.input import Ask
from gateway.store.batches import Line

App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]

CALLER = "tunegate.caller"  # as `gateway.routes` names it
RETRIED = (429, 500, 502, 503, 504)
UNLIMITED = (429, 503)  # waited for until the batch expires; others are tried MAX_TRIES times
MAX_TRIES = 3
MAX_WAIT_S = 60.0
WITHOUT_A_REPLY = ("stream", "background")  # what would leave a line without its whole reply


@dataclass(frozen=True)
class Answer:
    status: int
    request_id: str
    retry_after_s: float
    body: bytes


async def ask_line(app: App, endpoint: str, caller: Caller, ask: Ask) -> Line:
    """What became of a line, after waiting out what passes."""
    param = next((name for name in WITHOUT_A_REPLY if ask.body.get(name)), None)
    if param is not None:
        message = f"Each line of a batch is answered whole and at once: leave '{param}' out of its requests."
        error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
        refusal = Answer(400, "req_" + secrets.token_hex(16), 0, orjson.dumps({"error": error}))
        return _line(ask, refusal)
    tries = 0
    while True:
        answer = await _ask(app, endpoint, caller, orjson.dumps(ask.body))
        tries += answer.status not in UNLIMITED
        if answer.status not in RETRIED or tries >= MAX_TRIES or b'"request_too_large"' in answer.body:
            return _line(ask, answer)
        await asyncio.sleep(min(max(answer.retry_after_s, 0.5), MAX_WAIT_S))


def expired_line(ask: Ask) -> Line:
    """A line that was not asked in time."""
    message = "This request could not be executed before the completion window expired."
    return _unanswered(ask, "batch_expired", message)


def cancelled_line(ask: Ask) -> Line:
    """A line that was not asked before the batch was cancelled."""
    return _unanswered(ask, "batch_cancelled", "This request was not executed before the batch was cancelled.")


def _unanswered(ask: Ask, code: str, message: str) -> Line:
    said = {
        "id": _request_id(),
        "custom_id": ask.custom_id,
        "response": None,
        "error": {"code": code, "message": message},
    }
    return Line(ask.number, True, orjson.dumps(said).decode())


def _line(ask: Ask, answer: Answer) -> Line:
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        body = {"error": {"message": "The reply was no JSON.", "type": "server_error", "param": None, "code": None}}
    failed = not 200 <= answer.status < 300
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": body}
    said = {"id": _request_id(), "custom_id": ask.custom_id, "response": response, "error": None}
    usage = {} if failed or not isinstance(body, dict) else _usage(body.get("usage") or {})
    return Line(ask.number, failed, orjson.dumps(said).decode(), usage)


def _usage(told: dict[str, Any]) -> dict[str, int]:
    """A reply's usage, in the words of chat or of responses, as a batch sums it up."""
    inputs = told.get("prompt_tokens_details") or told.get("input_tokens_details") or {}
    outputs = told.get("completion_tokens_details") or told.get("output_tokens_details") or {}
    counts = {
        "input_tokens": told.get("prompt_tokens", told.get("input_tokens")),
        "output_tokens": told.get("completion_tokens", told.get("output_tokens")),
        "cached_tokens": inputs.get("cached_tokens"),
        "reasoning_tokens": outputs.get("reasoning_tokens"),
    }
    return {name: count or 0 for name, count in counts.items()}


async def _ask(app: App, endpoint: str, caller: Caller, body: bytes) -> Answer:
    """The answer to one POST, put to the application without a connection."""
    sent = False
    left = asyncio.Event()
    started: dict[str, Any] = {}
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": endpoint,
        "raw_path": endpoint.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": None,
        "server": None,
        "state": {},
        CALLER: caller,
    }
    try:
        await app(scope, receive, send)
    finally:
        left.set()
    headers = {name.lower(): value for name, value in started.get("headers", ())}
    retry_after = headers.get(b"retry-after", b"")
    return Answer(
        started.get("status", 500),
        headers.get(b"x-request-id", b"").decode(),
        float(retry_after) if retry_after.isdigit() else 0.0,
        b"".join(parts),
    )


def _request_id() -> str:
    return "batch_req_" + secrets.token_hex(16)
