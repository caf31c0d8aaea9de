"""Evals on the wire: what is tested and how, runs over data, and what became of each line. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.errors import RequestError
from gateway.wire import chat, fields, responses
from gateway.wire.chat import Usage
from gateway.wire.fields import Body, show
from gateway.wire.graders import Grader, parse_grader, parse_template
from gateway.wire.metadata import parse_metadata

if TYPE_CHECKING:
    from gateway.store.evals import Eval, EvalItem, EvalRun

MAX_CRITERIA = 50
MAX_ROWS = 10_000
RUN_STATUSES = ("queued", "in_progress", "completed", "canceled", "failed")
_PARAMS = "max_completion_tokens reasoning_effort response_format seed temperature text tools top_p".split()
_SOURCES = {
    "jsonl": ("file_content", "file_id"),
    "completions": ("file_content", "file_id", "stored_completions"),
    "responses": ("file_content", "file_id"),
}


@dataclass(frozen=True)
class CreateEval:
    name: str
    data_source_config: dict[str, Any]
    testing_criteria: list[Grader]
    metadata: dict[str, str] | None


def parse_create(body: Body) -> CreateEval:
    """Raises RequestError that names the field, its value and the rule."""
    fields.refuse_unknown(body, ("name", "data_source_config", "testing_criteria", "metadata"))
    raw = body.get("testing_criteria")
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_CRITERIA:
        raise RequestError(
            f"'testing_criteria' must be a list of 1 to {MAX_CRITERIA} graders, not {show(raw)}",
            param="testing_criteria",
        )
    criteria = [_criterion(one, f"testing_criteria[{number}]") for number, one in enumerate(raw)]
    names = [one["name"] for one in criteria]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"two of the 'testing_criteria' are called {show(name)}", param="testing_criteria")
    return CreateEval(
        fields.string(body, "name", 500) or "",
        _config(body.get("data_source_config")),
        criteria,
        parse_metadata(body.get("metadata")),
    )


def parse_update(body: Body) -> dict[str, Any]:
    """What changes: name, metadata. Raises RequestError."""
    fields.refuse_unknown(body, ("name", "metadata"))
    changes: dict[str, Any] = {}
    if (name := fields.string(body, "name", 500)) is not None:
        changes["name"] = name
    if "metadata" in body:
        changes["metadata"] = parse_metadata(body["metadata"])
    return changes


@dataclass(frozen=True)
class CreateRun:
    name: str
    model: str  # empty where the data bring the replies along
    data_source: dict[str, Any]
    metadata: dict[str, str] | None


def parse_run(body: Body) -> CreateRun:
    """Raises RequestError; what is asked of the model is checked as if it were asked now."""
    fields.refuse_unknown(body, ("name", "data_source", "metadata"))
    source = body.get("data_source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind not in _SOURCES:
        raise RequestError(
            f"'data_source' must be an object of type {', '.join(_SOURCES)}, not {show(source)}", param="data_source"
        )
    known = ("type", "source") if kind == "jsonl" else ("type", "source", "model", "input_messages", "sampling_params")
    for name in source:
        if name not in known:
            raise RequestError(
                f"'data_source.{name[:100]}' is no field of a {kind} source", param=f"data_source.{name[:100]}"
            )
    _check_rows(source.get("source"), _SOURCES[kind])
    model = "" if kind == "jsonl" else fields.string(source, "model", 1000) or ""
    if kind != "jsonl":
        _check_params(source.get("sampling_params"))
        source = source | {"input_messages": _input_messages(source, model)}
        if model:
            parse_asked(source, [{"role": "user", "content": "x"}])
    return CreateRun(fields.string(body, "name", 500) or "", model, source, parse_metadata(body.get("metadata")))


def parse_asked(
    source: Mapping[str, Any], messages: list[dict[str, Any]]
) -> chat.ChatRequest | responses.ResponseRequest:
    """What a run asks its model for one line. Raises RequestError."""
    params = dict(source.get("sampling_params") or {})
    if source["type"] == "completions":
        return chat.parse({"model": source["model"], "messages": messages, **params})
    if "max_completion_tokens" in params:
        params["max_output_tokens"] = params.pop("max_completion_tokens")
    if "reasoning_effort" in params:
        params["reasoning"] = {"effort": params.pop("reasoning_effort")}
    params.pop("seed", None)  # which responses do not know
    return responses.parse({"model": source["model"], "input": messages, **params, "store": False})


def parse_row(raw: Any, where: str) -> dict[str, Any]:
    """A line of data: {item, sample?}. Raises RequestError."""
    if not isinstance(raw, dict) or not isinstance(raw.get("item"), dict):
        raise RequestError(f"'{where}' must be an object {{\"item\": {{…}}}}, not {show(raw)}", param=where)
    sample = raw.get("sample")
    if sample is not None and not isinstance(sample, dict):
        raise RequestError(f"'{where}.sample' must be an object, not {show(sample)}", param=f"{where}.sample")
    return {"item": raw["item"], "sample": sample}


def eval_object(made: Eval) -> dict[str, Any]:
    return {
        "id": made.id,
        "object": "eval",
        "created_at": made.created_at,
        "name": made.name,
        "data_source_config": made.data_source_config,
        "testing_criteria": made.testing_criteria,
        "metadata": made.metadata or {},
    }


def run_object(run: EvalRun, summary: Mapping[str, Any], report_url: str) -> dict[str, Any]:
    """`error` is an object also where there is none: the SDK's strict mode knows no null here."""
    return {
        "id": run.id,
        "object": "eval.run",
        "created_at": run.created_at,
        "eval_id": run.eval_id,
        "name": run.name,
        "model": run.model,
        "status": run.status,
        "data_source": run.data_source,
        "metadata": run.metadata or {},
        "error": run.error or {"code": "", "message": ""},
        "report_url": report_url,
        **summary,
    }


def item_object(item: EvalItem, eval_id: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "object": "eval.run.output_item",
        "created_at": item.created_at,
        "run_id": item.run_id,
        "eval_id": eval_id,
        "status": item.status,
        "datasource_item": item.item,
        "datasource_item_id": item.number,
        "results": item.results,
        "sample": item.sample,
    }


def sample_object(
    *,
    model: str = "",
    messages: Iterable[Mapping[str, Any]] = (),
    output: str | None = None,
    finish_reason: str = "stop",
    usage: Usage | None = None,
    params: Mapping[str, Any] | None = None,
    error: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The `sample` of an output item: numbers that were not asked for are told as they are by default."""
    asked, used = params or {}, usage or Usage(0, 0)
    return {
        "model": model,
        "input": [{"role": message["role"], "content": message["content"]} for message in messages],
        "output": [] if output is None else [{"role": "assistant", "content": output}],
        "finish_reason": finish_reason,
        "usage": usage_counts(used),
        "error": error or {"code": "", "message": ""},
        "seed": asked.get("seed") or 0,
        "temperature": 1.0 if asked.get("temperature") is None else asked["temperature"],
        "top_p": 1.0 if asked.get("top_p") is None else asked["top_p"],
        "max_completion_tokens": asked.get("max_completion_tokens") or 0,
    }


def usage_counts(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    }


def summarise(
    criteria: Iterable[str], outcomes: Iterable[tuple[str, list[dict[str, Any]], dict[str, Any]]]
) -> dict[str, Any]:
    """What a run tells of its items (status, results, usage): counts in all, by criterion, and usage by model."""
    counts = {"total": 0, "passed": 0, "failed": 0, "errored": 0}
    by_criterion: dict[str, dict[str, Any]] = {
        name: {"testing_criteria": name, "passed": 0, "failed": 0} for name in criteria
    }
    by_model: dict[str, dict[str, Any]] = {}
    for status, results, usage in outcomes:
        counts["total"] += 1
        counts[{"pass": "passed", "fail": "failed"}.get(status, "errored")] += 1
        for result in results:
            by_criterion[result["name"]]["passed" if result["passed"] else "failed"] += 1
        for model, used in usage.items():
            sums = by_model.setdefault(model, {"model_name": model, "invocation_count": 0, **dict.fromkeys(used, 0)})
            for name, count in used.items():
                sums[name] += count
            sums["invocation_count"] += 1
    return {
        "result_counts": counts,
        "per_testing_criteria_results": list(by_criterion.values()),
        "per_model_usage": list(by_model.values()),
    }


def passes(criterion: Grader, score: float) -> bool:
    """Whether a score is enough: at the threshold; without one in the upper half of what is possible."""
    threshold = criterion.get("pass_threshold")
    if threshold is None:
        low, high = criterion.get("range") or (0.0, 1.0)
        threshold = (low + high) / 2
    return score >= threshold


def _criterion(raw: Any, where: str) -> Grader:
    grader = parse_grader(raw, where, extra=("pass_threshold",))
    if grader["type"] == "multi":
        raise RequestError(
            f"'{where}' is a multi grader, which evals do not take; list its parts", param=f"{where}.type"
        )
    threshold = fields.number(raw, "pass_threshold", -1e9, 1e9)
    if threshold is None and grader["type"] == "text_similarity":
        raise RequestError(
            f"'{where}.pass_threshold' must be a number: how alike is alike enough", param=f"{where}.pass_threshold"
        )
    return grader


def _config(raw: Any) -> dict[str, Any]:
    """What the data look like, told as a schema of {item, sample}."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or kind not in ("custom", "logs", "stored_completions"):
        raise RequestError(
            f"'data_source_config' must be an object of type custom, logs or stored_completions, not {show(raw)}",
            param="data_source_config",
        )
    item = raw.get("item_schema") if kind == "custom" else {"type": "object"}
    if not isinstance(item, dict):
        raise RequestError(
            f"'data_source_config.item_schema' must be a JSON schema, not {show(item)}",
            param="data_source_config.item_schema",
        )
    properties = {"item": item}
    if kind != "custom" or fields.boolean(raw, "include_sample_schema"):
        properties["sample"] = {"type": "object", "properties": {"output_text": {"type": "string"}}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    extra = {"metadata": parse_metadata(raw.get("metadata")) or {}} if kind != "custom" else {}
    return {"type": kind, "schema": schema, **extra}


def _check_rows(raw: Any, kinds: tuple[str, ...]) -> None:
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or kind not in kinds:
        raise RequestError(
            f"'data_source.source' must be an object of type {', '.join(kinds)}, not {show(raw)}",
            param="data_source.source",
        )
    if kind == "file_id":
        fields.required_string({"data_source.source.id": raw.get("id")}, "data_source.source.id", 200)
    elif kind == "stored_completions":
        fields.refuse_unknown(raw, ("type", "model", "metadata", "limit", "created_after", "created_before"))
        parse_metadata(raw.get("metadata"))
        fields.string(raw, "model", 1000)
        fields.integer(raw, "limit", 1, MAX_ROWS)
        for name in ("created_after", "created_before"):
            fields.integer(raw, name, 0, 2**62)
    else:
        content = raw.get("content")
        if not isinstance(content, list) or not 1 <= len(content) <= MAX_ROWS:
            raise RequestError(
                f"'data_source.source.content' must be a list of 1 to {MAX_ROWS} lines, not {show(content)}",
                param="data_source.source.content",
            )
        for number, row in enumerate(content):
            parse_row(row, f"data_source.source.content[{number}]")


def _check_params(raw: Any) -> None:
    param = "data_source.sampling_params"
    if raw is not None and (not isinstance(raw, dict) or any(name not in _PARAMS for name in raw)):
        raise RequestError(f"'{param}' may hold {', '.join(_PARAMS)}, not {show(raw)}", param=param)


def _input_messages(source: Mapping[str, Any], model: str) -> dict[str, Any] | None:
    raw, param = source.get("input_messages"), "data_source.input_messages"
    stored = source["source"]["type"] == "stored_completions"
    if raw is None:
        if not stored:
            raise RequestError(f"you must provide '{param}': what the model is asked for each line", param=param)
        return None
    if not model:
        raise RequestError("you must provide 'data_source.model', which is to answer", param="data_source.model")
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "template":
        return {"type": kind, "template": parse_template(raw.get("template"), f"{param}.template")}
    if kind == "item_reference" and isinstance(raw.get("item_reference"), str):
        return {"type": kind, "item_reference": raw["item_reference"]}
    raise RequestError(f"'{param}' must be a template or an item_reference, not {show(raw)}", param=param)
