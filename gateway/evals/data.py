"""The lines of a run's data, wherever they are: in the request, in an uploaded file, or among the stored completions."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import orjson

from gateway.errors import RequestError
from gateway.store import completions as completion_statements
from gateway.store import files as file_statements
from gateway.store.blobs import Blobs
from gateway.store.completions import Completion
from gateway.store.database import Store
from gateway.store.evals import EvalRun
from gateway.wire.evals import MAX_ROWS, parse_row

MAX_FILE_BYTES = 64 << 20
_STORED_BY_DEFAULT = 100

Row = dict[str, Any]  # {item, sample}


async def read_rows(store: Store, blobs: Blobs, run: EvalRun) -> list[Row]:
    """All of them. Raises RequestError where a file is not there (any more) or a line is none."""
    source = run.data_source["source"]
    match source["type"]:
        case "file_content":
            return [parse_row(row, f"content[{number}]") for number, row in enumerate(source["content"])]
        case "file_id":
            now = int(time.time())
            file = await store.read(
                lambda c: file_statements.select_file(c, source["id"], now=now, project_id=run.project_id)
            )
            if file is None:
                raise RequestError(f"the file {source['id'][:100]} does not exist", param="data_source.source.id")
            if file.size_bytes > MAX_FILE_BYTES:
                raise RequestError(f"the file {file.id} has {file.size_bytes} bytes; at most {MAX_FILE_BYTES} are read")
            return await asyncio.to_thread(_read_lines, blobs.path(file.digest))
    limit = source.get("limit") or _STORED_BY_DEFAULT
    page = await store.read(
        lambda c: completion_statements.select_completions(
            c,
            run.project_id,
            limit=limit,
            after=None,
            order="desc",
            model=source.get("model"),
            metadata=source.get("metadata") or None,
            created_after=source.get("created_after"),
            created_before=source.get("created_before"),
        )
    )
    return [_stored(completion) for completion in page.items]


def _read_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            if len(rows) == MAX_ROWS:
                raise RequestError(f"the file has more than {MAX_ROWS} lines")
            try:
                raw = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise RequestError(f"line {number} is no JSON: {error}") from error
            rows.append(parse_row(raw, f"line {number}"))
    return rows


def _stored(completion: Completion) -> Row:
    """What was asked is the item, what was answered the sample."""
    message = completion.body["choices"][0]["message"]
    item = {"id": completion.id, "input": completion.messages, "metadata": completion.metadata or {}}
    return {"item": item, "sample": {"output_text": message.get("content") or "", "model": completion.model}}
