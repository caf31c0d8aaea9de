"""Graders on the wire: checked, brought to one form, and the object that tells of a run. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.errors import RequestError
from gateway.wire import fields
from gateway.wire.fields import Body, show

Grader = dict[str, Any]

EMBEDDING_MODEL = "text-embedding-3-large"  # which OpenAI's cosine is computed with: a model or an alias here
MAX_GRADERS = 20
MAX_LABELS = 100
MAX_TEXT_CHARS = 200_000
OPERATIONS = ("eq", "ne", "like", "ilike")
METRICS = tuple("fuzzy_match bleu gleu meteor cosine rouge_1 rouge_2 rouge_3 rouge_4 rouge_5 rouge_l".split())
ROLES = ("user", "assistant", "system", "developer")

_SAMPLING = ("max_completions_tokens", "max_completion_tokens", "reasoning_effort", "seed", "temperature", "top_p")
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "string_check": ("input", "operation", "reference"),
    "text_similarity": ("input", "reference", "evaluation_metric"),
    "score_model": ("input", "model", "range", "sampling_params"),
    "label_model": ("input", "model", "labels", "passing_labels"),
    "multi": ("graders", "calculate_output"),
    "python": ("source", "image_tag"),
}
_ERRORS = (
    "formula_parse_error invalid_variable_error model_grader_parse_error model_grader_refusal_error model_grader_server_error "
    "other_error python_grader_runtime_error python_grader_server_error sample_parse_error truncated_observation_error "
    "unresponsive_reward_error".split()
)


def parse_grader(raw: Any, where: str, *, extra: Sequence[str] = (), nested: bool = False) -> Grader:
    """The grader, its messages in one form. `extra` are fields that it may have besides. Raises RequestError."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or not isinstance(raw, dict) or kind not in _FIELDS:
        raise RequestError(
            f"'{where}.type' must be one of {', '.join(_FIELDS)}, not {show(kind)}", param=f"{where}.type"
        )
    if kind == "python":
        raise RequestError(
            f"'{where}' is a python grader, whose code this server does not run; use the other graders, or grade outside",
            param=f"{where}.type",
        )
    for name in raw:
        if name not in ("type", "name", *_FIELDS[kind], *extra):
            raise RequestError(f"'{where}.{name[:100]}' is no field of a {kind} grader", param=f"{where}.{name[:100]}")
    grader = {**raw, "name": _text(raw, "name", where)}
    match kind:
        case "string_check":
            grader |= {name: _text(raw, name, where, empty=True) for name in ("input", "reference")}
            _one_of(raw, "operation", OPERATIONS, where)
        case "text_similarity":
            grader |= {name: _text(raw, name, where, empty=True) for name in ("input", "reference")}
            _one_of(raw, "evaluation_metric", METRICS, where)
        case "score_model":
            grader |= {"input": parse_template(raw.get("input"), f"{where}.input"), "model": _text(raw, "model", where)}
            _check_range(raw.get("range"), f"{where}.range")
            _check_sampling(raw.get("sampling_params"), f"{where}.sampling_params")
        case "label_model":
            grader |= {"input": parse_template(raw.get("input"), f"{where}.input"), "model": _text(raw, "model", where)}
            _check_labels(raw, where)
        case "multi":
            if nested:
                raise RequestError(f"'{where}' is a multi grader inside another", param=f"{where}.type")
            grader["graders"] = _graders(raw.get("graders"), f"{where}.graders")
            _text(raw, "calculate_output", where)
    return grader


def grader_items(grader: Grader) -> list[tuple[str, Grader]]:
    """The parts of a multi grader by the names that its formula knows: an object's keys, else their own names."""
    graders = grader["graders"]
    if isinstance(graders, list):
        return [(part["name"], part) for part in graders]
    if isinstance(graders.get("type"), str):
        return [(graders["name"], graders)]
    return list(graders.items())


def parse_template(raw: Any, where: str) -> list[dict[str, Any]]:
    """Messages with placeholders, each as {type, role, content}. A role that is none is a user's."""
    if not isinstance(raw, list) or not 1 <= len(raw) <= 1000:
        raise RequestError(f"'{where}' must be a list of 1 to 1000 messages, not {show(raw)}", param=where)
    messages = []
    for number, message in enumerate(raw):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"'{where}[{number}]' must be an object with role and content, not {show(message)}",
                param=f"{where}[{number}]",
            )
        content = message.get("content")
        try:
            text = input_text(content)
        except (KeyError, TypeError) as error:
            raise RequestError(
                f"'{where}[{number}].content' must be text, not {show(content)}", param=f"{where}[{number}].content"
            ) from error
        if len(text) > MAX_TEXT_CHARS:
            raise RequestError(
                f"'{where}[{number}].content' has {len(text)} characters; at most {MAX_TEXT_CHARS} are taken",
                param=f"{where}[{number}].content",
            )
        role = message["role"] if message["role"] in ROLES else "user"
        kind = "output_text" if role == "assistant" else "input_text"
        messages.append({"type": "message", "role": role, "content": {"type": kind, "text": text}})
    return messages


def input_text(content: Any) -> str:
    """The text of a message's content: itself, a part of text, or several. Raises KeyError, TypeError."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(input_text, content))
    if content["type"] not in ("text", "input_text", "output_text") or not isinstance(content["text"], str):
        raise TypeError(content["type"])
    return str(content["text"])


def parse_run(body: Body) -> tuple[Grader, str, dict[str, Any]]:
    """(grader, model_sample, item) of a request to run a grader. Raises RequestError."""
    fields.refuse_unknown(body, ("grader", "model_sample", "item"))
    sample = fields.string(body, "model_sample", 1_000_000)
    if sample is None:
        raise RequestError("you must provide 'model_sample', the reply that is graded", param="model_sample")
    item = body.get("item")
    if item is not None and not isinstance(item, dict):
        raise RequestError(f"'item' must be an object, not {show(item)}", param="item")
    return parse_grader(body.get("grader"), "grader"), sample, item or {}


def run_object(
    grader: Grader,
    *,
    reward: float,
    sub_rewards: Mapping[str, float],
    errors: Mapping[str, Any],
    tokens_by_model: Mapping[str, int],
    sampled_model: str | None,
    elapsed_s: float,
) -> dict[str, Any]:
    details = {name: value for name, value in errors.items() if name not in _ERRORS}
    kept = {f"{name}_details": None for name in ("model_grader_server_error", "python_grader_runtime_error")}
    return {
        "reward": reward,
        "sub_rewards": dict(sub_rewards),
        "metadata": {
            "name": grader["name"],
            "type": grader["type"],
            "errors": {
                **{name: bool(errors.get(name)) for name in _ERRORS},
                **kept,
                "python_grader_server_error_type": None,
                **details,
            },
            "execution_time": elapsed_s,
            "scores": dict(sub_rewards) or {grader["name"]: reward},
            "token_usage": sum(tokens_by_model.values()) if tokens_by_model else None,
            "sampled_model_name": sampled_model,
        },
        "model_grader_token_usage_per_model": dict(tokens_by_model),
    }


def _graders(raw: Any, where: str) -> Any:
    """The parts, in the client's own form: one grader, a list of them, or an object of them by name."""
    if isinstance(raw, dict) and isinstance(raw.get("type"), str):
        return parse_grader(raw, where, nested=True)
    if not isinstance(raw, dict | list) or not 1 <= len(raw) <= MAX_GRADERS:
        raise RequestError(f"'{where}' must be 1 to {MAX_GRADERS} graders by name, not {show(raw)}", param=where)
    if isinstance(raw, list):
        return [parse_grader(part, f"{where}[{number}]", nested=True) for number, part in enumerate(raw)]
    return {name: parse_grader(part, f"{where}.{name[:100]}", nested=True) for name, part in raw.items()}


def _text(raw: Grader, name: str, where: str, *, empty: bool = False) -> str:
    value = raw.get(name)
    if not isinstance(value, str) or not (value or empty) or len(value) > MAX_TEXT_CHARS:
        raise RequestError(
            f"'{where}.{name}' must be a text of at most {MAX_TEXT_CHARS} characters, not {show(value)}",
            param=f"{where}.{name}",
        )
    return value


def _one_of(raw: Grader, name: str, known: Sequence[str], where: str) -> None:
    if raw.get(name) not in known:
        raise RequestError(
            f"'{where}.{name}' must be one of {', '.join(known)}, not {show(raw.get(name))}", param=f"{where}.{name}"
        )


def _check_range(raw: Any, where: str) -> None:
    if raw is None:
        return
    numbers = isinstance(raw, list) and len(raw) == 2 and all(type(value) in (int, float) for value in raw)
    if not numbers or not raw[0] < raw[1]:
        raise RequestError(f"'{where}' must be two numbers, the lower first, not {show(raw)}", param=where)


def _check_sampling(raw: Any, where: str) -> None:
    if raw is None:
        return
    if not isinstance(raw, dict) or any(name not in _SAMPLING for name in raw):
        raise RequestError(f"'{where}' may hold {', '.join(_SAMPLING)}, not {show(raw)}", param=where)
    fields.number(raw, "temperature", 0, 2)
    fields.number(raw, "top_p", 0, 1)
    fields.integer(raw, "seed", -(2**63), 2**63 - 1)
    for name in ("max_completions_tokens", "max_completion_tokens"):
        fields.integer(raw, name, 1, 2**31)


def _check_labels(raw: Grader, where: str) -> None:
    for name in ("labels", "passing_labels"):
        listed = raw.get(name)
        texts = isinstance(listed, list) and all(isinstance(label, str) and label for label in listed)
        if not texts or not 1 <= len(listed or ()) <= MAX_LABELS:
            raise RequestError(
                f"'{where}.{name}' must be 1 to {MAX_LABELS} texts, not {show(listed)}", param=f"{where}.{name}"
            )
    unknown = [label for label in raw["passing_labels"] if label not in raw["labels"]]
    if unknown:
        raise RequestError(
            f"'{where}.passing_labels' has {show(unknown[0])}, which is none of the labels",
            param=f"{where}.passing_labels",
        )
