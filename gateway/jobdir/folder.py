"""The paths of one job, how each file in it is read and written, and the lock that its trainer holds."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from gateway.jobdir.files import process_start_time, read_json, write_json
from gateway.jobdir.spec import JobSpec
from gateway.jobdir.told import Check, Result

LOCKED_EXIT_CODE = 75  # EX_TEMPFAIL: another trainer holds the lock; nothing was done
PAUSED_EXIT_CODE = 76  # `pause` was there: the trainer ended behind a checkpoint
CHECK_RECORD = "check.process.json"  # which process checks the job's files, as the gateway started it
ADAPTER_GGUF = "adapter.gguf"  # for a llama worker: an adapter of a base that vLLM serves has none
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    ADAPTER_GGUF,
    "manifest.json",
    "witness.json",
    "template/template.json",
    "template/tokenizer.json",
)


@dataclass(frozen=True)
class Holder:
    """Who holds the lock: a pid that is only trusted together with the start time of its process."""

    pid: int
    start_time: int  # clock ticks since boot, field 22 of /proc/PID/stat


class JobDir:
    """Paths of one job, and how each file in it is read and written."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.lock = self.path / "lock"
        self.pause = self.path / "pause"
        self.data = self.path / "data"
        self.template = self.path / "template"
        self.examples = self.path / "examples"
        self.start = self.path / "start"
        self.attempts = self.path / "attempts"
        self.checkpoints = self.path / "checkpoints"
        self.tracking = self.path / "tracking"
        self.adapter = self.path / "adapter"

    # the gateway writes these

    def write_spec(self, spec: JobSpec) -> None:
        write_json(self.path / "job.json", spec.to_json())

    def read_spec(self) -> JobSpec:
        return JobSpec.from_json(read_json(self.path / "job.json"))

    # the trainer writes these

    def write_check(self, check: Check) -> None:
        write_json(self.path / "check.json", asdict(check))

    def read_check(self) -> Check | None:
        path = self.path / "check.json"
        return Check.from_json(read_json(path)) if path.exists() else None

    def write_result(self, result: Result) -> None:
        write_json(self.path / "result.json", asdict(result))

    def read_result(self) -> Result | None:
        path = self.path / "result.json"
        return Result.from_json(read_json(path)) if path.exists() else None

    def events_path(self, attempt: int) -> Path:
        return self.attempts / str(attempt) / "events.jsonl"

    def predictions_path(self, attempt: int) -> Path:
        return self.attempts / str(attempt) / "predictions.jsonl"

    def next_attempt(self) -> int:
        """The number of the attempt that a trainer starting now should take: 1, 2, …"""
        taken = [int(p.name) for p in self.attempts.iterdir() if p.name.isdigit()] if self.attempts.is_dir() else []
        return max(taken, default=0) + 1

    # the lock

    def try_lock(self, wait_s: float = 1.0) -> int | None:
        """A file descriptor that holds the lock until it is closed, or None when another process holds it.

        Tries for `wait_s`, since `is_locked` in another process takes the lock shared for an instant.
        """
        fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    return None
                time.sleep(0.02)
        holder = Holder(os.getpid(), process_start_time(os.getpid()) or 0)
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(asdict(holder)).encode(), 0)
        return fd

    def is_locked(self) -> bool:
        """Whether a trainer is alive. Takes the lock shared for an instant, never while one is held exclusively."""
        try:
            fd = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def holder(self) -> Holder | None:
        """The trainer that holds the lock; None when nobody does or its process is a stranger by now."""
        if not self.is_locked():
            return None
        try:
            holder = Holder(**json.loads(self.lock.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return holder if process_start_time(holder.pid) == holder.start_time else None
