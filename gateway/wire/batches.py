"""Batches on the wire: a create request becomes a `NewBatch`, a row becomes OpenAI's `batch` object. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.errors import RequestError
from gateway.wire.fields import Body, refuse_unknown, required_string, show
from gateway.wire.files import parse_expiry_object
from gateway.wire.metadata import parse_metadata

if TYPE_CHECKING:
    from gateway.store.batches import Batch

WINDOWS_S = {"24h": 86_400}
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/moderations")
STATES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


@dataclass(frozen=True)
class NewBatch:
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    output_expires_after_s: int | None


def parse_create(body: Body) -> NewBatch:
    """Raises RequestError that names the field."""
    known = ("endpoint", "input_file_id", "completion_window", "metadata", "output_expires_after")
    refuse_unknown(body, known)
    endpoint = required_string(body, "endpoint", 200)
    if endpoint not in ENDPOINTS:
        raise RequestError(
            f"'endpoint' is {show(endpoint)}; a batch asks one of {', '.join(ENDPOINTS)}", param="endpoint"
        )
    window = required_string(body, "completion_window", 20)
    if window not in WINDOWS_S:
        raise RequestError(f"'completion_window' is {show(window)}; it must be '24h'", param="completion_window")
    try:
        expires_after_s = parse_expiry_object(body.get("output_expires_after"), "batch_output")
    except RequestError as error:
        error.param = (error.param or "").replace("expires_after", "output_expires_after", 1)
        raise
    return NewBatch(
        endpoint=endpoint,
        input_file_id=required_string(body, "input_file_id", 200),
        completion_window=window,
        metadata=parse_metadata(body.get("metadata")),
        output_expires_after_s=expires_after_s,
    )


def batch_object(batch: Batch) -> dict[str, Any]:
    usage, times = batch.usage, batch.times
    input_tokens, output_tokens = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{f"{state}_at": times.get(state) for state in STATES},
        "request_counts": {"total": batch.n_total, "completed": batch.n_completed, "failed": batch.n_failed},
        "usage": {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.get("reasoning_tokens", 0)},
            "total_tokens": input_tokens + output_tokens,
        },
        "metadata": batch.metadata,
    }
