"""The rows that openai-python's tests ask for by id. Put back before each: they cancel and delete.

Imported by this package and, flat, by `sdk_plugin` inside the SDK's own pytest, where `tests` is the SDK's package.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import Connection, create_engine, delete, event, insert, select

from gateway.store import tables
from gateway.wire.evals import sample_object

CREATED_AT = 1_760_000_000
_INPUT = {
    "id": "msg_0",
    "type": "message",
    "role": "user",
    "status": "completed",
    "content": [{"type": "input_text", "text": "Hello?"}],
}
_RESPONSE = {
    "object": "response",
    "created_at": CREATED_AT,
    "completed_at": CREATED_AT,
    "status": "completed",
    "background": True,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "model": "gpt-6-astra",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": None,
    "user": None,
}


def put(connection: Connection, file_id: str) -> None:
    """Every row in its first state; `file_id` is an uploaded file, whose bytes the seeded ones share."""
    for table, rows in _rows(connection, file_id).items():
        target = tables.metadata.tables[table]
        key = target.c["name" if table == "models" else "id"]
        connection.execute(delete(target).where(key.in_([row[key.name] for row in rows])))
        for row in rows:
            connection.execute(insert(target).values(**row))


def _rows(connection: Connection, file_id: str) -> dict[str, list[dict[str, object]]]:
    files = tables.files
    found = connection.execute(select(files).where(files.c.id == file_id)).mappings().one()
    uploaded = {name: value for name, value in found.items() if name != "seq"}
    purposes = {"file-abc123": "fine-tune", "file_id": "fine-tune", "input_file_id": "batch"}
    said = [
        {"role": "assistant", "content": "Hello."}
    ]  # the SDK's strict mode knows stored messages of this role alone
    completion = {
        "id": "completion_id",
        "object": "chat.completion",
        "created": CREATED_AT,
        "model": "gpt-6-astra",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
    }
    return {
        "completions": [
            {
                "id": "completion_id",
                "created_at": CREATED_AT,
                "model": "gpt-6-astra",
                "messages": said,
                "body": completion,
            }
        ],
        "responses": [
            {
                "id": name,
                "created_at": CREATED_AT,
                "status": "completed",
                "background": True,
                "request": {},
                "items": [_INPUT],
                "body": {**_RESPONSE, "id": name},
            }
            for name in ("resp_677efb5139a88190b512bc3fef8e535d", "previous_response_id", "resp_123", "response_id")
        ],
        "evals": [
            {
                "id": "eval_id",
                "created_at": CREATED_AT,
                "updated_at": CREATED_AT,
                "name": "seeded",
                "data_source_config": {"type": "custom", "schema": {"type": "object"}},
                "testing_criteria": [
                    {
                        "type": "string_check",
                        "name": "same",
                        "input": "{{ item.foo }}",
                        "reference": "bar",
                        "operation": "eq",
                    }
                ],
                "metadata": None,
            }
        ],
        "eval_runs": [
            {
                "id": "run_id",
                "created_at": CREATED_AT,
                "eval_id": "eval_id",
                "name": "seeded",
                "model": "",
                "data_source": {
                    "type": "jsonl",
                    "source": {"type": "file_content", "content": [{"item": {"foo": "bar"}}]},
                },
                "status": "canceled",
                "n_items": 1,
            }
        ],
        "eval_items": [
            {
                "id": "output_item_id",
                "created_at": CREATED_AT,
                "run_id": "run_id",
                "number": 0,
                "status": "pass",
                "item": {"foo": "bar"},
                "sample": sample_object(),
                "results": [{"name": "same", "passed": True, "score": 1.0}],
                "usage": {},
            }
        ],
        "uploads": [
            {
                "id": "upload_abc123",
                "created_at": CREATED_AT,
                "filename": "seed.jsonl",
                "purpose": "fine-tune",
                "mime_type": "application/jsonl",
                "size_bytes": uploaded["size_bytes"],
                "status": "pending",
                "expires_at": 4_000_000_000,
            }
        ],
        "upload_parts": [
            {
                "id": "string",
                "upload_id": "upload_abc123",
                "created_at": CREATED_AT,
                "size_bytes": uploaded["size_bytes"],
                "digest": uploaded["digest"],
            }
        ],
        "batches": [
            {
                "id": "batch_id",
                "created_at": CREATED_AT,
                "endpoint": "/v1/responses",
                "input_file_id": "input_file_id",
                "input_digest": uploaded["digest"],
                "completion_window": "24h",
                "expires_at": CREATED_AT + 86_400,
                "status": "cancelled",
                "times": {"cancelling": CREATED_AT, "cancelled": CREATED_AT},
                "n_total": 0,
                "n_completed": 0,
                "n_failed": 0,
            }
        ],
        "models": [
            {
                "name": name,
                "created_at": CREATED_AT,
                "base": "tunegate-demo",
                "adapter_digest": "sha256:" + "0" * 64,
                "adapter_path": "nowhere",
                "engine_name": "nobody",
                "template_digest": "sha256:" + "0" * 64,
                "owned_by": "seeded",
                "deleted_at": deleted_at,  # no engine serves them, so one can only be deleted again
            }
            for name, deleted_at in (
                ("ft:gpt-4o-mini:acemeco:suffix:abc123", CREATED_AT),
                ("ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd", None),
                ("ft-AF1WoRqd3aJAHsqc9NY7iL8F", None),
            )
        ],
        "permissions": [
            {
                "id": "cp_zc4Q7MP6XxulcVzj4MZdwsAB",
                "created_at": CREATED_AT,
                "model": model,
                "project_id": "proj_seeded",
            }
            for model in ("ft:gpt-4o-mini-2024-07-18:org:weather:B7R9VjQd",)
        ],
        "files": [{**uploaded, "id": name, "purpose": purpose} for name, purpose in purposes.items()],
        "jobs": [
            {
                "id": "ft-AF1WoRqd3aJAHsqc9NY7iL8F",
                "created_at": CREATED_AT,
                "model": "gpt-4o-mini",
                "base": "tunegate-demo",
                "training_file": "file-abc123",
                "seed": 42,
                "hyperparameters": {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"},
                "status": "queued",  # so it may be paused, resumed and cancelled
                "pause": "paused",
            }
        ],
    }


def connect(database: Path):
    """An engine of its own on the gateway's file, which is in WAL mode: both may write, one after the other."""
    engine = create_engine(f"sqlite:///{database}", connect_args={"timeout": 30})

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")  # nothing here outlives the run

    return engine
