"""How a worker is started, and how one that an earlier gateway started is found again: what stands in its folder.

    key          the bearer key of this worker, 0600, made anew for every spawn
    spawn.json   pid, start time and what it was started with; written right after the fork
    ready.json   written by the worker when it can decode: pid, start time, port
    worker.log   its stdout and stderr; worker.log.1 the one before

Everything here blocks for some milliseconds and is called on a thread. The data folder's lock makes sure that no second
gateway works on the same folder.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gateway
from gateway.engines.handle import ProcessHandle
from gateway.jobdir import process_start_time, read_json, write_json

log = logging.getLogger(__name__)

LOG_LIMIT_BYTES = 4 << 20
LOG_TAIL_BYTES = 4096
WORKER_COMMAND = (sys.executable, "-m", "gateway.llama_worker")


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is started with. A running one whose spec is equal is as good as a new one."""

    served_name: str
    model: Path
    base_digest: str
    context: int | None = None  # tokens a sequence; None: what the model was trained for
    max_seqs: int = 8
    threads: int | None = None  # None: the worker chooses
    prefix_cache_mib: int = 512
    adapters_in_memory: int = 16
    command: tuple[str, ...] = WORKER_COMMAND

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a running worker to be taken over; our version too, for the dialect's sake."""
        return {
            "tunegate": gateway.__version__,
            "command": list(self.command),
            "served_name": self.served_name,
            "model": str(self.model),
            "base_digest": self.base_digest,
            "context": self.context,
            "max_seqs": self.max_seqs,
            "threads": self.threads,
            "prefix_cache_mib": self.prefix_cache_mib,
            "adapters_in_memory": self.adapters_in_memory,
        }


class WorkerFolder:
    """DATA/engines/NAME: its files, and the worker that they tell of."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.key = self.path / "key"
        self.spawn_record = self.path / "spawn.json"
        self.ready_file = self.path / "ready.json"
        self.log = self.path / "worker.log"

    def spawn(self, spec: WorkerSpec) -> ProcessHandle:
        """Starts a worker in a session of its own. OSError when that cannot be done."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ready_file.unlink(missing_ok=True)
        self.spawn_record.unlink(missing_ok=True)
        self._write_key()
        self._rotate_log()
        with self.log.open("ab") as log_file:
            child = subprocess.Popen(
                self._argv(spec),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                # `-m` looks in the working directory first: it must be ours, not one with some other `gateway` in it.
                cwd=Path(gateway.__file__).parent.parent,
            )
        handle = ProcessHandle.of_child(child)
        try:
            write_json(self.spawn_record, self._record(handle.pid, handle.start_time, spec))
        except OSError:  # a full disk: a worker that nobody would find again must not stay
            child.kill()
            child.wait()
            handle.close()
            raise
        return handle

    def find_worker(self, spec: WorkerSpec) -> tuple[ProcessHandle | None, list[ProcessHandle]]:
        """The live worker that can be taken over, and those of ours that cannot and have to be ended."""
        adoptable: ProcessHandle | None = None
        leftovers: list[ProcessHandle] = []
        record = _read_object(self.spawn_record)
        recorded = _open_recorded(record)
        if recorded is not None:
            if record == self._record(recorded.pid, recorded.start_time, spec):
                adoptable = recorded
            else:
                leftovers.append(recorded)
        # A gateway killed between the fork and spawn.json leaves a worker that only its command line tells of.
        for pid in _session_leaders():
            if (recorded is None or pid != recorded.pid) and _is_told_to_write(pid, str(self.ready_file)):
                handle = ProcessHandle.open(pid, process_start_time(pid) or -1)
                if handle is not None:
                    leftovers.append(handle)
        return adoptable, leftovers

    def ready_port(self, handle: ProcessHandle) -> int | None:
        """The port on which this very process says that it is ready; None while it does not."""
        ready = _read_object(self.ready_file)
        port = ready.get("port")
        if ready.get("pid") != handle.pid or ready.get("start_time") != handle.start_time:
            return None
        return port if type(port) is int and 0 < port < 65536 else None

    def read_key(self) -> str:
        """The key of the running worker; OSError when it is not readable."""
        return self.key.read_text().strip()

    def log_tail(self, lines: int = 8) -> str:
        """The last lines that the worker wrote, joined by " | "; control characters replaced."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        kept = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
        return "".join(c if c.isprintable() else "?" for c in " | ".join(kept))

    def _record(self, pid: int, start_time: int, spec: WorkerSpec) -> dict[str, Any]:
        return {"pid": pid, "start_time": start_time, "ready_file": str(self.ready_file), "spec": spec.fingerprint()}

    def _argv(self, spec: WorkerSpec) -> list[str]:
        argv = [*spec.command, "--model", str(spec.model), "--served-name", spec.served_name]
        argv += ["--key-file", str(self.key), "--ready-file", str(self.ready_file), "--max-seqs", str(spec.max_seqs)]
        argv += ["--cache-mib", str(spec.prefix_cache_mib), "--max-adapters", str(spec.adapters_in_memory)]
        if spec.context is not None:
            argv += ["--ctx", str(spec.context)]
        if spec.threads is not None:
            argv += ["--threads", str(spec.threads)]
        return argv

    def _write_key(self) -> None:
        self.key.unlink(missing_ok=True)
        fd = os.open(self.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(32))

    def _rotate_log(self) -> None:
        try:
            if self.log.stat().st_size > LOG_LIMIT_BYTES:
                os.replace(self.log, self.log.with_name("worker.log.1"))
        except FileNotFoundError:
            pass


def _open_recorded(record: dict[str, Any]) -> ProcessHandle | None:
    """The recorded worker while it lives.

    Its command line is looked at too: after a reboot a stranger may have the same pid and the same start time.
    """
    pid, start_time, ready_file = record.get("pid"), record.get("start_time"), record.get("ready_file")
    if type(pid) is not int or type(start_time) is not int or not isinstance(ready_file, str) or pid <= 1:
        return None
    handle = ProcessHandle.open(pid, start_time)
    if handle is not None and not _is_told_to_write(pid, ready_file):
        handle.close()
        return None
    return handle


def _session_leaders() -> Iterator[int]:
    """Workers are spawned as such; a child that one forks is none, though it shows the same command line."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == int(entry.name):
                yield int(entry.name)
        except ProcessLookupError:
            continue


def _is_told_to_write(pid: int, ready_file: str) -> bool:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False
    return (b"--ready-file", os.fsencode(ready_file)) in itertools.pairwise(argv)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        log.warning("%s is not readable and is taken as absent: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}
