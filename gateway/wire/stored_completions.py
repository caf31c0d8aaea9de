"""Stored chat completions: what is kept of a request, and the objects that are shown of it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gateway.errors import RequestError
from gateway.wire.fields import Body, show
from gateway.wire.metadata import parse_metadata

if TYPE_CHECKING:
    from gateway.store.completions import Completion

_SHOWN = "temperature top_p presence_penalty frequency_penalty seed tools tool_choice response_format".split()


def stored_request(body: Body) -> dict[str, Any]:
    """What is kept of a chat request: its messages, its metadata and how it was sampled. Raises RequestError."""
    return {
        "messages": body.get("messages"),
        "metadata": parse_metadata(body.get("metadata")),
        "shown": {name: body[name] for name in _SHOWN if body.get(name) is not None},
    }


def parse_update(body: Body) -> dict[str, str] | None:
    """The new metadata, all that can be changed. Raises RequestError."""
    unknown = next((name for name in body if name != "metadata"), None)
    if unknown is not None or "metadata" not in body:
        raise RequestError(
            f"of a stored completion only 'metadata' can be changed; the request has {show(sorted(body))}",
            param=unknown or "metadata",
        )
    return parse_metadata(body["metadata"])


def completion_object(completion: Completion) -> dict[str, Any]:
    """The `chat.completion`, with the metadata that it has now."""
    return {**completion.body, "metadata": completion.metadata or {}}


def deleted_object(completion_id: str) -> dict[str, Any]:
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}


def message_objects(completion: Completion) -> list[dict[str, Any]]:
    """The messages that were sent, each with an id; content in parts is told both ways."""
    return [_message(completion.id, number, raw) for number, raw in enumerate(completion.messages)]


def _message(completion_id: str, number: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    content = raw.get("content")
    in_parts = isinstance(content, list)
    text = "".join(part.get("text") or "" for part in content or ()) if in_parts else content
    return {
        "refusal": None,
        "name": None,
        **raw,
        "id": f"{completion_id}-{number}",
        "content": text,
        "content_parts": content if in_parts else None,
    }
