"""What a trainer wrote since the last look: its events.jsonl as rows to be stored, with the cursor behind them.

Its one rule: the cursor is only ever moved together with what was read before it. Attempts are read in their order; one is
left for the next only when it is read to its end and the next is there, for then no trainer writes to it any more.
Blocking.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from gateway.jobdir import Event, JobDir
from gateway.store.checkpoints import NewCheckpoint
from gateway.store.events import NewEvent
from gateway.store.jobs import Job, Progress

logger = logging.getLogger("tunegate.jobs")

BATCH_LINES = 1000
MAX_LINE_BYTES = 1 << 20


def read_progress(folder: JobDir, job: Job, name_checkpoint: Callable[[int], str]) -> Progress | None:
    """What stands behind the job's cursor; None when there is nothing."""
    following = [n for n in _attempts(folder) if n > job.attempt]  # looked for first: see the module's rule
    if job.attempt:
        progress = _read_attempt(folder, job.id, job.attempt, job.cursor_offset, name_checkpoint)
        if progress is not None:
            return progress
    return Progress(attempt=min(following), offset=0) if following else None


def _attempts(folder: JobDir) -> list[int]:
    try:
        return [int(entry.name) for entry in folder.attempts.iterdir() if entry.name.isdigit()]
    except FileNotFoundError:
        return []


def _read_attempt(
    folder: JobDir, job_id: str, attempt: int, offset: int, name_checkpoint: Callable[[int], str]
) -> Progress | None:
    try:
        file = folder.events_path(attempt).open("rb")
    except FileNotFoundError:
        return None
    events: list[NewEvent] = []
    checkpoints: list[NewCheckpoint] = []
    estimated_finish: int | None = None
    first_step: int | None = None
    begin = offset
    with file:
        file.seek(offset)
        for _ in range(BATCH_LINES):
            line = file.readline(MAX_LINE_BYTES)
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                break  # torn, or not written to its end yet
            offset += len(line)
            event = _parse(line, job_id, attempt)
            if event is None:
                continue
            data = {name: value for name, value in event.data.items() if _is_finite(value)}
            if event.type == "progress":
                estimated_finish = data.get("estimated_finish", estimated_finish)
                continue
            if event.type == "metrics" and first_step is None and attempt > 1:
                first_step = data.get("step")
            if event.type == "checkpoint" and isinstance(step := data.get("step"), int):
                checkpoints.append(NewCheckpoint(event.created_at, step, data, name_checkpoint(step)))
            events.append(
                NewEvent(
                    message=event.message,
                    level=event.level,
                    type="metrics" if event.type == "metrics" else "message",
                    data=data or None,
                    created_at=event.created_at,
                    source_key=f"{job_id}/{attempt}/{event.seq}",
                )
            )
    if offset == begin:
        return None
    return Progress(attempt, offset, tuple(events), tuple(checkpoints), estimated_finish, first_step)


def _parse(line: bytes, job_id: str, attempt: int) -> Event | None:
    """The event of a line; None, with a word in the log, for one that is none: the others still count."""
    try:
        event = Event(**json.loads(line))
        if (
            type(event.seq) is int
            and type(event.created_at) is int
            and isinstance(event.message, str)
            and isinstance(event.data, dict)
            and event.level in ("info", "warn", "error")
            and event.type in ("message", "metrics", "checkpoint", "progress")
        ):
            return event
    except (ValueError, TypeError, RecursionError):
        pass
    logger.warning("job %s, attempt %d: a line of events.jsonl is no event: %.80r", job_id, attempt, line)
    return None


def _is_finite(value: Any) -> bool:
    """JSON has no NaN and no infinity, and clients refuse them."""
    return not isinstance(value, float) or math.isfinite(value)
