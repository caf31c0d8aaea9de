"""What each route takes and gives, by `METHOD /path`. Bounds are those of the readers in `wire`, which have the last word."""

from __future__ import annotations

from gateway.openapi import resources
from gateway.openapi.objects import (
    COUNT,
    FLAG,
    METADATA,
    TEXT,
    Schema,
    closed,
    deleted,
    listed,
    maybe,
    one_of,
    page_of,
    ref,
)
from gateway.wire.batches import ENDPOINTS, WINDOWS_S
from gateway.wire.exports import TYPES as EXPORT_TYPES
from gateway.wire.files import MAX_EXPIRY_S, MIN_EXPIRY_S, PURPOSES
from gateway.wire.fine_tuning import MAX_SEED, MAX_SUFFIX_CHARS
from gateway.wire.integrations import MAX_INTEGRATIONS, MAX_NAME_CHARS, MAX_TAG_CHARS, MAX_TAGS, TRACKERS
from gateway.wire.permissions import MAX_PROJECTS, ORDERS
from gateway.wire.training_method import VARIANTS
from gateway.wire.training_options import BETA, HYPERPARAMETERS, OPTIONS, Rule
from gateway.wire.uploads import MAX_PARTS
from gateway.wire.usage import GROUPS, MAX_TIME, WIDTHS

JSON = "application/json"
FORM = "multipart/form-data"


def _body(required: str, **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


_EXPIRY = closed(
    anchor=one_of("created_at"), seconds={"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S}
)
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": one_of("system", "user", "assistant"), "content": TEXT},
        "required": ["role", "content"],
    },
}
_BETWEEN_0_AND_2 = maybe({"type": "number", "minimum": 0, "maximum": 2})
_PENALTY = maybe({"type": "number", "minimum": -2, "maximum": 2})
_SAMPLING = {
    "temperature": _BETWEEN_0_AND_2,
    "top_p": maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "n": maybe({"type": "integer", "minimum": 1, "maximum": 8}),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "max_tokens": maybe({"type": "integer", "minimum": 1, "maximum": 64}),
    "seed": maybe({"type": "integer"}),
    "stop": {"anyOf": [{"type": "null"}, TEXT, {"type": "array", "items": TEXT, "maxItems": 4}]},
    "user": maybe(TEXT),
}


def _optional(**fields: Schema) -> Schema:
    """An object of fields that may each be absent or null."""
    return {
        "type": ["object", "null"],
        "properties": {name: maybe(field) for name, field in fields.items()},
        "additionalProperties": False,
    }


def _by_rules(*tables: dict[str, Rule]) -> Schema:
    return _optional(**{name: rule.schema for table in tables for name, rule in table.items()})


_WANDB_NAME = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
_WANDB_TAG = {"type": "string", "minLength": 1, "maxLength": MAX_TAG_CHARS}
_WANDB = _body(
    "project",
    project=_WANDB_NAME,
    name=maybe(_WANDB_NAME),
    entity=maybe(_WANDB_NAME),
    tags=maybe({"type": "array", "items": _WANDB_TAG, "maxItems": MAX_TAGS}),
)
_METHOD = _body(
    "type",
    type=one_of("supervised", "dpo"),
    supervised=_optional(hyperparameters=_by_rules(HYPERPARAMETERS, OPTIONS)),
    dpo=_optional(hyperparameters=_by_rules(HYPERPARAMETERS, BETA, OPTIONS)),
    reinforcement={},
)
_TUNEGATE = _optional(
    method=one_of(*VARIANTS),
    tracking=listed(one_of(*TRACKERS)),
    turns=one_of("all", "last"),
    chat_template_kwargs={"type": "object"},
    **{name: rule.schema for name, rule in OPTIONS.items()},
)

# Media type and schema of the request's body.
BODIES: dict[str, tuple[str, Schema]] = {
    "POST /v1/chat/completions": (
        JSON,
        {
            "type": "object",
            "properties": {"model": TEXT, "messages": _MESSAGES, **_SAMPLING, "logprobs": maybe(FLAG)},
            "required": ["messages"],
        },
    ),
    "POST /v1/completions": (
        JSON,
        {"type": "object", "properties": {"model": TEXT, "prompt": TEXT, **_SAMPLING}, "required": ["prompt"]},
    ),
    "POST /v1/embeddings": (
        JSON,
        _body(
            "model input",
            model=TEXT,
            input={"anyOf": [TEXT, listed(TEXT)]},
            encoding_format=one_of("float", "base64"),
            user=TEXT,
        ),
    ),
    "POST /v1/files": (
        FORM,
        _body("file purpose", file={"type": "string", "format": "binary"}, purpose=one_of(*PURPOSES)),
    ),
    "POST /v1/uploads": (
        JSON,
        _body(
            "bytes filename mime_type purpose",
            bytes={"type": "integer", "minimum": 1},
            filename={"type": "string", "minLength": 1},
            mime_type={"type": "string", "minLength": 1, "maxLength": 255},
            purpose=one_of(*PURPOSES),
            expires_after=maybe(_EXPIRY),
        ),
    ),
    "POST /v1/uploads/{upload_id}/parts": (FORM, _body("data", data={"type": "string", "format": "binary"})),
    "POST /v1/uploads/{upload_id}/complete": (
        JSON,
        _body(
            "part_ids",
            part_ids={"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_PARTS, "uniqueItems": True},
            md5=maybe(TEXT),
        ),
    ),
    "POST /v1/batches": (
        JSON,
        _body(
            "endpoint input_file_id completion_window",
            endpoint=one_of(*ENDPOINTS),
            input_file_id={"type": "string", "minLength": 1},
            completion_window=one_of(*WINDOWS_S),
            metadata=METADATA,
            output_expires_after=maybe(_EXPIRY),
        ),
    ),
    "POST /v1/fine_tuning/jobs": (
        JSON,
        _body(
            "model training_file",
            model={"type": "string", "minLength": 1},
            training_file={"type": "string", "minLength": 1},
            validation_file=maybe(TEXT),
            suffix=maybe({"type": "string", "minLength": 1, "maxLength": MAX_SUFFIX_CHARS}),
            seed=maybe({"type": "integer", "minimum": 0, "maximum": MAX_SEED}),
            hyperparameters=_by_rules(HYPERPARAMETERS),
            method=maybe(_METHOD),
            metadata=METADATA,
            integrations=maybe(
                {
                    "type": "array",
                    "maxItems": MAX_INTEGRATIONS,
                    "items": _body("type wandb", type=one_of("wandb"), wandb=_WANDB),
                }
            ),
            tunegate=_TUNEGATE,
        ),
    ),
    "POST /v1/fine_tuning/checkpoints/{model}/permissions": (
        JSON,
        _body("project_ids", project_ids={"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_PROJECTS}),
    ),
    "POST /v1/responses": (
        JSON,
        {
            "type": "object",
            "properties": {
                "model": TEXT,
                "input": TEXT,
                "max_output_tokens": maybe({"type": "integer", "minimum": 16, "maximum": 64}),
                "temperature": _BETWEEN_0_AND_2,
                "store": maybe(FLAG),
            },
            "required": ["input"],
        },
    ),
    **resources.BODIES,
    "POST /v1/fine_tuning/preview": (JSON, {"type": "object"}),
    "POST /v1/models/{model}/export": (
        JSON,
        _body("to", to=one_of(*EXPORT_TYPES), type=maybe(TEXT), expires_after=maybe(_EXPIRY)),
    ),
    "POST /v1/templates": (JSON, {"type": "object", "required": ["name", "kind", "source"]}),
}

_LIMIT = {"type": "integer", "minimum": 0, "maximum": 100}
_PAGE: dict[str, Schema] = {"after": TEXT, "limit": _LIMIT, "order": one_of("asc", "desc")}
_USAGE: dict[str, Schema] = {
    "start_time": {"type": "integer", "minimum": 0, "maximum": MAX_TIME},
    "end_time": {"type": "integer", "minimum": 0, "maximum": MAX_TIME},
    "bucket_width": one_of(*WIDTHS),
    "limit": {"type": "integer", "minimum": 1, "maximum": 31},
    "group_by": listed(one_of(*GROUPS)),
    "models": listed(TEXT),
    "project_ids": listed(TEXT),
    "api_key_ids": listed(TEXT),
    "page": COUNT,
}
_PERMISSIONS = "/v1/fine_tuning/checkpoints/{model}/permissions"

QUERIES: dict[str, dict[str, Schema]] = {
    "GET /v1/files": {**_PAGE, "limit": {"type": "integer", "minimum": 0, "maximum": 10_000}, "purpose": TEXT},
    "GET /v1/batches": _PAGE,
    "GET /v1/fine_tuning/jobs": _PAGE,
    "GET /v1/fine_tuning/jobs/{job_id}/events": _PAGE,
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": _PAGE,
    f"GET {_PERMISSIONS}": {"after": TEXT, "limit": _LIMIT, "order": one_of(*ORDERS), "project_id": TEXT},
    "GET /v1/organization/usage/completions": _USAGE,
    "GET /v1/organization/usage/embeddings": _USAGE,
    **resources.QUERIES,
}

_JOB = (JSON, ref("Job"))
_UPLOAD = (JSON, ref("Upload"))
_BATCH = (JSON, ref("Batch"))
_USAGE_PAGE = (JSON, ref("UsagePage"))

# Media type and schema of a reply that is no error.
REPLIES: dict[str, tuple[str, Schema]] = {
    "POST /v1/chat/completions": (JSON, ref("ChatCompletion")),
    "POST /v1/completions": (JSON, ref("Completion")),
    "POST /v1/embeddings": (JSON, ref("Embeddings")),
    "GET /v1/models": (JSON, closed(object=one_of("list"), data=listed(ref("Model")))),
    "GET /v1/models/{model}": (JSON, ref("Model")),
    "DELETE /v1/models/{model}": (JSON, deleted("model")),
    "POST /v1/models/{model}/export": (JSON, ref("File")),
    "POST /v1/files": (JSON, ref("File")),
    "GET /v1/files": (JSON, page_of("File")),
    "GET /v1/files/{file_id}": (JSON, ref("File")),
    "DELETE /v1/files/{file_id}": (JSON, deleted("file")),
    "GET /v1/files/{file_id}/content": ("*/*", {}),
    "POST /v1/uploads": _UPLOAD,
    "GET /v1/uploads/{upload_id}": _UPLOAD,
    "GET /v1/uploads/{upload_id}/parts": (
        JSON,
        closed(object=one_of("list"), data=listed({"type": "object"}), has_more=FLAG),
    ),
    "POST /v1/uploads/{upload_id}/parts": (JSON, ref("Part")),
    "POST /v1/uploads/{upload_id}/complete": _UPLOAD,
    "POST /v1/uploads/{upload_id}/cancel": _UPLOAD,
    "POST /v1/batches": _BATCH,
    "GET /v1/batches": (JSON, page_of("Batch")),
    "GET /v1/batches/{batch_id}": _BATCH,
    "POST /v1/batches/{batch_id}/cancel": _BATCH,
    "POST /v1/fine_tuning/jobs": _JOB,
    "GET /v1/fine_tuning/jobs": (JSON, page_of("Job")),
    "GET /v1/fine_tuning/jobs/{job_id}": _JOB,
    "POST /v1/fine_tuning/jobs/{job_id}/cancel": _JOB,
    "POST /v1/fine_tuning/jobs/{job_id}/pause": _JOB,
    "POST /v1/fine_tuning/jobs/{job_id}/resume": _JOB,
    "GET /v1/fine_tuning/jobs/{job_id}/events": (JSON, page_of("JobEvent")),
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints": (JSON, page_of("Checkpoint")),
    f"POST {_PERMISSIONS}": (JSON, page_of("Permission")),
    f"GET {_PERMISSIONS}": (JSON, page_of("Permission")),
    f"DELETE {_PERMISSIONS}/{{permission_id}}": (JSON, deleted("checkpoint.permission")),
    "GET /v1/organization/usage/completions": _USAGE_PAGE,
    "GET /v1/organization/usage/embeddings": _USAGE_PAGE,
    **resources.REPLIES,
    "GET /v1/openapi.json": (JSON, {"type": "object", "required": ["openapi", "paths"]}),
    "GET /v1/templates": (JSON, closed(object=one_of("list"), data=listed(ref("Template")))),
    "GET /v1/templates/{name}": (JSON, ref("Template")),
    "POST /v1/templates": (JSON, ref("Template")),
}
