"""Responses, stored completions, graders and evals: what their routes take and give. Merged into the tables of `requests`."""

from __future__ import annotations

from gateway.openapi.objects import (
    COUNT,
    FLAG,
    METADATA,
    NUMBER,
    TEXT,
    WHOLE,
    Schema,
    closed,
    listed,
    maybe,
    one_of,
    ref,
)
from gateway.wire.evals import MAX_CRITERIA, MAX_ROWS, RUN_STATUSES
from gateway.wire.graders import METRICS, OPERATIONS

JSON = "application/json"
_LIMIT = {"type": "integer", "minimum": 0, "maximum": 100}
_PAGE: dict[str, Schema] = {"after": TEXT, "limit": _LIMIT, "order": one_of("asc", "desc")}


def _some(required: str, **fields: Schema) -> Schema:
    """An object that has at least the required fields."""
    return {"type": "object", "properties": fields, "required": required.split()}


def _page(of: Schema) -> Schema:
    return closed(object=one_of("list"), data=listed(of), first_id=maybe(TEXT), last_id=maybe(TEXT), has_more=FLAG)


_USAGE = closed(
    input_tokens=COUNT,
    input_tokens_details=closed(cached_tokens=COUNT, cache_write_tokens=COUNT),
    output_tokens=COUNT,
    output_tokens_details=closed(reasoning_tokens=COUNT),
    total_tokens=COUNT,
)
_ITEM = _some("id type", id=TEXT, type=TEXT)
_COUNTS = closed(total=COUNT, passed=COUNT, failed=COUNT, errored=COUNT)

OBJECTS: dict[str, Schema] = {
    "Response": _some(
        "id object created_at status error incomplete_details model output usage metadata parallel_tool_calls tools",
        id=TEXT,
        object=one_of("response"),
        created_at=WHOLE,
        status=one_of("completed", "failed", "in_progress", "cancelled", "queued", "incomplete"),
        error=maybe(_some("code message", code=TEXT, message=TEXT)),
        model=TEXT,
        output=listed(_ITEM),
        usage=maybe(_USAGE),
        metadata=METADATA,
    ),
    "Compaction": closed(
        id=TEXT, object=one_of("response.compaction"), created_at=WHOLE, output=listed(_ITEM), usage=_USAGE
    ),
    "GraderRun": closed(
        reward=NUMBER,
        sub_rewards={"type": "object"},
        metadata=_some("name type errors execution_time scores", name=TEXT, type=TEXT),
        model_grader_token_usage_per_model={"type": "object"},
    ),
    "Eval": closed(
        id=TEXT,
        object=one_of("eval"),
        created_at=WHOLE,
        name=TEXT,
        data_source_config={"type": "object"},
        testing_criteria=listed({"type": "object"}),
        metadata=METADATA,
    ),
    "EvalRun": closed(
        id=TEXT,
        object=one_of("eval.run"),
        created_at=WHOLE,
        eval_id=TEXT,
        name=TEXT,
        model=TEXT,
        status=one_of(*RUN_STATUSES),
        data_source={"type": "object"},
        metadata=METADATA,
        error=closed(code=TEXT, message=TEXT),
        report_url=TEXT,
        result_counts=_COUNTS,
        per_testing_criteria_results=listed(closed(testing_criteria=TEXT, passed=COUNT, failed=COUNT)),
        per_model_usage=listed({"type": "object"}),
    ),
    "OutputItem": closed(
        id=TEXT,
        object=one_of("eval.run.output_item"),
        created_at=WHOLE,
        run_id=TEXT,
        eval_id=TEXT,
        status=one_of("pass", "fail", "error"),
        datasource_item={"type": "object"},
        datasource_item_id=COUNT,
        results=listed(_some("name passed score", name=TEXT, passed=FLAG, score=NUMBER)),
        sample={"type": "object"},
    ),
}

_COMPARED = {"name": {"type": "string", "minLength": 1}, "input": TEXT, "reference": TEXT}
_CHECK = _some(
    "type name input reference operation", type=one_of("string_check"), operation=one_of(*OPERATIONS), **_COMPARED
)
_SIMILARITY = _some(
    "type name input reference evaluation_metric",
    type=one_of("text_similarity"),
    evaluation_metric=one_of(*METRICS),
    **_COMPARED,
)
_GRADER = {"anyOf": [_CHECK, _SIMILARITY]}
_ROW = _some("item", item={"type": "object"}, sample=maybe({"type": "object"}))
_ASKED = _some(
    "input",
    model=TEXT,
    input=TEXT,
    instructions=maybe(TEXT),
    truncation=maybe(one_of("auto", "disabled")),
)

BODIES: dict[str, tuple[str, Schema]] = {
    "POST /v1/chat/completions/{completion_id}": (JSON, closed(metadata=METADATA)),
    "POST /v1/responses/input_tokens": (JSON, _ASKED),
    "POST /v1/responses/compact": (JSON, _ASKED),
    "POST /v1/fine_tuning/alpha/graders/run": (
        JSON,
        _some("grader model_sample", grader=_GRADER, model_sample=TEXT, item=maybe({"type": "object"})),
    ),
    "POST /v1/fine_tuning/alpha/graders/validate": (JSON, _some("grader", grader=_GRADER)),
    "POST /v1/moderations": (JSON, _some("input", input={"anyOf": [TEXT, listed(TEXT)]}, model=TEXT)),
    "POST /v1/evals": (
        JSON,
        _some(
            "data_source_config testing_criteria",
            name=TEXT,
            data_source_config=_some("type item_schema", type=one_of("custom"), item_schema={"type": "object"}),
            testing_criteria={**listed(_CHECK), "minItems": 1, "maxItems": MAX_CRITERIA},
            metadata=METADATA,
        ),
    ),
    "POST /v1/evals/{eval_id}": (JSON, _some("", name=TEXT, metadata=METADATA)),
    "POST /v1/evals/{eval_id}/runs": (
        JSON,
        _some(
            "data_source",
            name=TEXT,
            data_source=_some(
                "type source",
                type=one_of("jsonl"),
                source=_some(
                    "type content",
                    type=one_of("file_content"),
                    content={**listed(_ROW), "minItems": 1, "maxItems": MAX_ROWS},
                ),
            ),
            metadata=METADATA,
        ),
    ),
}

_RUNS = "/v1/evals/{eval_id}/runs"
_RUN = f"{_RUNS}/{{run_id}}"

QUERIES: dict[str, dict[str, Schema]] = {
    "GET /v1/chat/completions": {**_PAGE, "model": TEXT},
    "GET /v1/chat/completions/{completion_id}/messages": _PAGE,
    "GET /v1/responses/{response_id}/input_items": _PAGE,
    "GET /v1/evals": {**_PAGE, "order_by": one_of("created_at", "updated_at")},
    f"GET {_RUNS}": {**_PAGE, "status": one_of(*RUN_STATUSES)},
    f"GET {_RUN}/output_items": {**_PAGE, "status": one_of("fail", "pass", "error")},
}

_COMPLETION = (JSON, ref("ChatCompletion"))
_RESPONSE = (JSON, ref("Response"))
_EVAL_RUN = (JSON, ref("EvalRun"))

REPLIES: dict[str, tuple[str, Schema]] = {
    "GET /v1/chat/completions": (JSON, _page(ref("ChatCompletion"))),
    "GET /v1/chat/completions/{completion_id}": _COMPLETION,
    "POST /v1/chat/completions/{completion_id}": _COMPLETION,
    "DELETE /v1/chat/completions/{completion_id}": (
        JSON,
        closed(id=TEXT, object=one_of("chat.completion.deleted"), deleted=FLAG),
    ),
    "GET /v1/chat/completions/{completion_id}/messages": (JSON, _page(_some("id role content"))),
    "POST /v1/responses": _RESPONSE,
    "GET /v1/responses/{response_id}": _RESPONSE,
    "DELETE /v1/responses/{response_id}": (JSON, closed(id=TEXT, object=one_of("response"), deleted=FLAG)),
    "POST /v1/responses/{response_id}/cancel": _RESPONSE,
    "GET /v1/responses/{response_id}/input_items": (JSON, _page(_ITEM)),
    "POST /v1/responses/input_tokens": (JSON, closed(object=one_of("response.input_tokens"), input_tokens=COUNT)),
    "POST /v1/responses/compact": (JSON, ref("Compaction")),
    "POST /v1/fine_tuning/alpha/graders/run": (JSON, ref("GraderRun")),
    "POST /v1/fine_tuning/alpha/graders/validate": (JSON, closed(grader={"type": "object"})),
    "GET /v1/evals": (JSON, _page(ref("Eval"))),
    "POST /v1/evals": (JSON, ref("Eval")),
    "GET /v1/evals/{eval_id}": (JSON, ref("Eval")),
    "POST /v1/evals/{eval_id}": (JSON, ref("Eval")),
    "DELETE /v1/evals/{eval_id}": (JSON, closed(object=one_of("eval.deleted"), deleted=FLAG, eval_id=TEXT)),
    f"GET {_RUNS}": (JSON, _page(ref("EvalRun"))),
    f"POST {_RUNS}": _EVAL_RUN,
    f"GET {_RUN}": _EVAL_RUN,
    f"POST {_RUN}": _EVAL_RUN,
    f"POST {_RUN}/cancel": _EVAL_RUN,
    f"DELETE {_RUN}": (JSON, closed(object=one_of("eval.run.deleted"), deleted=FLAG, run_id=TEXT)),
    f"GET {_RUN}/output_items": (JSON, _page(ref("OutputItem"))),
    f"GET {_RUN}/output_items/{{item_id}}": (JSON, ref("OutputItem")),
}
