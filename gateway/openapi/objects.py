"""The objects that replies hold, as JSON schemas: closed where that is sure, so that a field too many or too few is seen."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}
METADATA: Schema = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def maybe(schema: Schema) -> Schema:
    """Or null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def one_of(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def listed(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def closed(**fields: Schema) -> Schema:
    """An object that has these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def page_of(name: str) -> Schema:
    """OpenAI's list of objects, with its ids and whether there are more."""
    return closed(
        object=one_of("list"), data=listed(ref(name)), first_id=maybe(TEXT), last_id=maybe(TEXT), has_more=FLAG
    )


def deleted(kind: str) -> Schema:
    return closed(id=TEXT, object=one_of(kind), deleted=FLAG)


_USAGE: Schema = {
    "type": "object",
    "properties": {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT},
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
}
_FINISH = one_of("stop", "length", "tool_calls", "function_call", "content_filter")

_BY_TYPE: Schema = {"type": "object", "properties": {"hyperparameters": {"type": "object"}}}
_JOB_METHOD: Schema = {
    "type": "object",
    "properties": {"type": one_of("supervised", "dpo"), "supervised": _BY_TYPE, "dpo": _BY_TYPE},
    "required": ["type"],
    "additionalProperties": False,
}

OBJECTS: dict[str, Schema] = {
    "Error": closed(error=closed(message=TEXT, type=TEXT, param=maybe(TEXT), code=maybe(TEXT))),
    "Model": closed(id=TEXT, object=one_of("model"), created=WHOLE, owned_by=TEXT),
    "File": closed(
        id=TEXT,
        object=one_of("file"),
        bytes=COUNT,
        created_at=WHOLE,
        filename=TEXT,
        purpose=TEXT,
        status=one_of("uploaded", "processed", "error"),
        status_details=maybe(TEXT),
        expires_at=maybe(WHOLE),
    ),
    "Upload": closed(
        id=TEXT,
        object=one_of("upload"),
        bytes=COUNT,
        created_at=WHOLE,
        filename=TEXT,
        purpose=TEXT,
        status=one_of("pending", "completed", "cancelled", "expired"),
        expires_at=WHOLE,
        file=maybe(ref("File")),
    ),
    "Part": closed(id=TEXT, object=one_of("upload.part"), created_at=WHOLE, upload_id=TEXT),
    "Batch": closed(
        id=TEXT,
        object=one_of("batch"),
        endpoint=TEXT,
        model=maybe(TEXT),
        errors=maybe(
            closed(
                object=one_of("list"),
                data=listed(closed(code=TEXT, message=TEXT, line=maybe(WHOLE), param=maybe(TEXT))),
            )
        ),
        input_file_id=TEXT,
        completion_window=TEXT,
        status=one_of(
            "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
        ),
        output_file_id=maybe(TEXT),
        error_file_id=maybe(TEXT),
        created_at=WHOLE,
        expires_at=WHOLE,
        in_progress_at=maybe(WHOLE),
        finalizing_at=maybe(WHOLE),
        completed_at=maybe(WHOLE),
        failed_at=maybe(WHOLE),
        expired_at=maybe(WHOLE),
        cancelling_at=maybe(WHOLE),
        cancelled_at=maybe(WHOLE),
        request_counts=closed(total=COUNT, completed=COUNT, failed=COUNT),
        usage=closed(
            input_tokens=COUNT,
            input_tokens_details=closed(cached_tokens=COUNT),
            output_tokens=COUNT,
            output_tokens_details=closed(reasoning_tokens=COUNT),
            total_tokens=COUNT,
        ),
        metadata=METADATA,
    ),
    "Job": {
        "type": "object",
        "properties": {
            "id": TEXT,
            "object": one_of("fine_tuning.job"),
            "created_at": WHOLE,
            "error": maybe({"type": "object"}),
            "fine_tuned_model": maybe(TEXT),
            "finished_at": maybe(WHOLE),
            "estimated_finish": maybe(WHOLE),
            "hyperparameters": {"type": "object"},
            "method": _JOB_METHOD,
            "model": TEXT,
            "organization_id": TEXT,
            "result_files": listed(TEXT),
            "seed": WHOLE,
            "status": one_of("validating_files", "queued", "running", "succeeded", "failed", "cancelled"),
            "trained_tokens": maybe(WHOLE),
            "training_file": TEXT,
            "validation_file": maybe(TEXT),
            "integrations": listed(closed(type=one_of("wandb"), wandb={"type": "object"})),
            "metadata": METADATA,
            "tunegate": {"type": "object"},
        },
        "required": [
            "id",
            "object",
            "created_at",
            "error",
            "estimated_finish",
            "fine_tuned_model",
            "finished_at",
            "hyperparameters",
            "integrations",
            "method",
            "model",
            "organization_id",
            "result_files",
            "seed",
            "status",
            "trained_tokens",
            "training_file",
            "tunegate",
            "validation_file",
        ],
    },
    "JobEvent": {
        "type": "object",
        "properties": {
            "id": TEXT,
            "object": one_of("fine_tuning.job.event"),
            "created_at": WHOLE,
            "level": one_of("info", "warn", "error"),
            "message": TEXT,
            "type": one_of("message", "metrics"),
        },
        "required": ["id", "object", "created_at", "level", "message", "type"],
    },
    "Checkpoint": {
        "type": "object",
        "properties": {
            "id": TEXT,
            "object": one_of("fine_tuning.job.checkpoint"),
            "created_at": WHOLE,
            "fine_tuned_model_checkpoint": TEXT,
            "fine_tuning_job_id": TEXT,
            "metrics": {"type": "object"},
            "step_number": COUNT,
        },
        "required": ["id", "object", "created_at", "fine_tuned_model_checkpoint", "fine_tuning_job_id", "metrics"],
    },
    "Permission": closed(id=TEXT, object=one_of("checkpoint.permission"), created_at=WHOLE, project_id=TEXT),
    "ChatCompletion": {
        "type": "object",
        "properties": {
            "id": TEXT,
            "object": one_of("chat.completion"),
            "created": WHOLE,
            "model": TEXT,
            "choices": listed(
                {
                    "type": "object",
                    "properties": {
                        "index": COUNT,
                        "finish_reason": _FINISH,
                        "logprobs": maybe({"type": "object"}),
                        "message": {
                            "type": "object",
                            "properties": {
                                "role": one_of("assistant"),
                                "content": maybe(TEXT),
                                "refusal": maybe(TEXT),
                            },
                            "required": ["role", "content", "refusal"],
                        },
                    },
                    "required": ["index", "finish_reason", "logprobs", "message"],
                }
            ),
            "usage": _USAGE,
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    },
    "Completion": {
        "type": "object",
        "properties": {
            "id": TEXT,
            "object": one_of("text_completion"),
            "created": WHOLE,
            "model": TEXT,
            "choices": listed(
                {
                    "type": "object",
                    "properties": {"index": COUNT, "finish_reason": _FINISH, "text": TEXT},
                    "required": ["index", "finish_reason", "text", "logprobs"],
                }
            ),
            "usage": _USAGE,
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    },
    "Embeddings": closed(
        object=one_of("list"),
        data=listed(
            closed(object=one_of("embedding"), index=COUNT, embedding={"anyOf": [TEXT, listed(NUMBER)]}),
        ),
        model=TEXT,
        usage=closed(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "UsagePage": closed(
        object=one_of("page"),
        data=listed(
            closed(object=one_of("bucket"), start_time=WHOLE, end_time=WHOLE, results=listed({"type": "object"}))
        ),
        has_more=FLAG,
        next_page=maybe(TEXT),
    ),
    "Template": {
        "type": "object",
        "properties": {"id": TEXT, "object": one_of("template"), "kind": TEXT, "origin": TEXT, "version": TEXT},
        "required": ["id", "object", "kind", "origin", "version", "created_at", "overrides", "bases"],
    },
}
