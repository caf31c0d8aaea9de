"""`/v1/fine_tuning/preview`, an extension of ours: what a training file trains, line by line. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import RequestError
from gateway.jobdir import TrainOn
from gateway.wire.fields import integer, refuse_unknown, required_string, show, string
from gateway.wire.fine_tuning import Rendering, parse_rendering

FIELDS = ("model", "training_file", "lines", "limit", "tunegate")
DEFAULT_LIMIT = 20
MAX_LIMIT = 1000


@dataclass(frozen=True)
class PreviewRequest:
    """One of `training_file` (an id) and `content` (JSON lines) is there."""

    model: str
    training_file: str | None
    content: bytes | None
    limit: int
    rendering: Rendering
    train_on: TrainOn = "assistant"


def parse_preview(body: Mapping[str, Any]) -> PreviewRequest:
    """Raises RequestError."""
    refuse_unknown(body, FIELDS)
    model = required_string(body, "model")
    training_file = string(body, "training_file")
    lines = body.get("lines")
    if (training_file is None) == (lines is None):
        raise RequestError(
            "you must provide one of 'training_file', the id of an uploaded file, and 'lines', a list of examples",
            param="lines" if training_file else "training_file",
        )
    limit = integer(body, "limit", 0, MAX_LIMIT)
    rendering = parse_rendering(body.get("tunegate"), beside=("train_on",))
    train_on = (body.get("tunegate") or {}).get("train_on")
    if train_on not in ("assistant", "all", None):
        raise RequestError(
            f"'tunegate.train_on' must be 'assistant' or 'all', not {show(train_on)}", param="tunegate.train_on"
        )
    return PreviewRequest(
        model,
        training_file,
        None if lines is None else _content(lines),
        DEFAULT_LIMIT if limit is None else limit,
        rendering,
        train_on or "assistant",
    )


def preview_body(
    model: str,
    template: str,
    version: str,
    max_length: int,
    lines: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """`version` is the digest of the bundle that a job created now would get."""
    return {
        "object": "fine_tuning.preview",
        "model": model,
        "template": {"id": template, "version": version},
        "max_length": max_length,
        "data": list(lines),
        "summary": dict(summary),
    }


def _content(lines: Any) -> bytes:
    """A string is a line as it stands in a file, right or wrong; anything else is written as one."""
    if not isinstance(lines, list):
        raise RequestError(f"'lines' must be a list of examples, not {show(lines)}", param="lines")
    written = []
    for number, line in enumerate(lines):
        if isinstance(line, str) and ("\n" in line or "\r" in line):
            raise RequestError(f"'lines[{number}]' holds a line break; give each line by itself", param="lines")
        written.append(line if isinstance(line, str) else json.dumps(line))
    return "".join(f"{line}\n" for line in written).encode("utf-8", "surrogatepass")
