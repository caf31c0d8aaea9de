"""The lines of a batch's input file, read one at a time: checked when the batch begins, parsed again as each is asked.

Blocking; memory is bounded by one line and the custom ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

MAX_LINES = 50_000
MAX_BYTES = 200 * 1024 * 1024
MAX_ID_CHARS = 512
MAX_ERRORS = 50  # that are told

FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Ask:
    """A line: what to ask, under the client's own name for it. `number` counts from 1."""

    number: int
    custom_id: str
    body: dict[str, Any]


@dataclass
class Findings:
    """What a check found; `errors` in OpenAI's form, none for a file that can be run."""

    n_lines: int = 0
    model: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, code: str, message: str, line: int | None = None, param: str | None = None) -> None:
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({"code": code, "message": message, "line": line, "param": param})


def check_input(path: Path, endpoint: str, max_line_bytes: int) -> Findings:
    """Reads the whole file once."""
    found, seen = Findings(), set[str]()
    if path.stat().st_size > MAX_BYTES:
        found.add("file_too_large", f"The file has {path.stat().st_size} bytes; a batch takes {MAX_BYTES}.")
        return found
    for number, line in _lines(path, max_line_bytes):
        found.n_lines += 1
        if found.n_lines > MAX_LINES:
            found.add("too_many_tasks", f"The file has more than {MAX_LINES} requests; split it.")
            break
        if line is None:
            found.add("line_too_long", f"This line is longer than {max_line_bytes} bytes.", number)
            continue
        try:
            ask = _parse(number, line, endpoint)
        except _BadLine as error:
            found.add(error.code, error.message, number, error.param)
            continue
        if ask.custom_id in seen:
            found.add(
                "duplicate_custom_id",
                f"The custom_id {ask.custom_id[:80]!r} is on an earlier line too.",
                number,
                "custom_id",
            )
        seen.add(ask.custom_id)
        if found.model is None and isinstance(model := ask.body.get("model"), str):
            found.model = model[:200]
    if not found.n_lines:
        found.add("empty_file", "The file has no requests.")
    return found


def read_input(path: Path, endpoint: str, max_line_bytes: int) -> Iterator[Ask]:
    """The requests of a file that was checked."""
    for number, line in _lines(path, max_line_bytes):
        if line is not None:
            yield _parse(number, line, endpoint)


class _BadLine(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line that is not blank; None for one that is too long, which is skipped unread."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(max_line_bytes + 1):
            number += 1
            if len(line) > max_line_bytes:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield number, None
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _parse(number: int, line: bytes, endpoint: str) -> Ask:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _BadLine("invalid_json_line", f"This line is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise _BadLine("invalid_json_line", "This line must be a JSON object.")
    if unknown := sorted(set(value) - FIELDS):
        raise _BadLine(
            "unknown_field", f"This line has the field {unknown[0][:80]!r}; it takes {sorted(FIELDS)}.", unknown[0]
        )
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        raise _BadLine(
            "missing_required_parameter",
            f"'custom_id' must be a string of 1 to {MAX_ID_CHARS} characters.",
            "custom_id",
        )
    if value.get("method") != "POST":
        raise _BadLine("invalid_method", f"'method' must be 'POST', not {value.get('method')!r:.60}.", "method")
    if value.get("url") != endpoint:
        raise _BadLine(
            "mismatched_url", f"'url' is {value.get('url')!r:.80}; the batch was created for {endpoint!r}.", "url"
        )
    if not isinstance(body, dict):
        raise _BadLine("missing_required_parameter", "'body' must be an object, the request's parameters.", "body")
    return Ask(number, custom_id, body)
