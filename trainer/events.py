"""What a running job says: one line of JSON an event, appended as it happens.

Place in the flow: loop → attempts/N/events.jsonl → the gateway, which follows the file. One rule: a line is written with one
call, so that a reader sees it whole or torn at the end, never mixed.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from gateway.jobdir import Event, JobDir, fsync_folder, read_events


class EventLog:
    """The events of one attempt. Flushed with each event; on the disk after `sync`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._seq = 0
        fsync_folder(path.parent)

    def write(
        self,
        type: Literal["message", "metrics", "checkpoint", "progress"],
        message: str,
        data: dict[str, Any] | None = None,
        level: Literal["info", "warn", "error"] = "info",
    ) -> None:
        self._seq += 1
        event = Event(self._seq, int(time.time()), type, message, level, data or {})
        line = json.dumps(asdict(event)).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]

    def sync(self) -> None:
        os.fsync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


class Silence(EventLog):
    """The events of a process that another one speaks for."""

    def __init__(self) -> None:
        pass

    def write(self, *_: Any, **__: Any) -> None:
        pass

    def sync(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def told_checkpoints(job: JobDir) -> set[int]:
    """The steps whose checkpoint some attempt has already written an event of."""
    return {
        int(event.data["step"])
        for attempt in (job.attempts.iterdir() if job.attempts.is_dir() else ())
        for event, _ in read_events(attempt / "events.jsonl")
        if event.type == "checkpoint"
    }
