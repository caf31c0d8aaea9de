"""How a worker is started, and how one that an earlier gateway started is found again: what stands in its folder.

    key          the bearer key of this worker, 0600, made anew for every spawn
    spawn.json   pid, start time, port where it was given one, and what it was started with; written right after the fork
    ready.json   written by a llama worker when it can decode: pid, start time, port
    worker.log   its stdout and stderr; worker.log.1 the one before

What differs between kinds of workers is a `Launch` (`llama_launch`, `vllm_launch`). Everything here blocks for some
milliseconds and is called on a thread. The data folder's lock makes sure that no second gateway works on the same folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gateway
from gateway.engines.handle import ProcessHandle
from gateway.jobdir import process_start_time, read_json, write_json

if TYPE_CHECKING:
    from gateway.engines.control import EngineControl

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
READY_FILE = "ready.json"
PYTHON_MARK = "tunegate_engine"
LOG_LIMIT_BYTES = 4 << 20
LOG_TAIL_BYTES = 4096
LOG_LINE_CHARS = 200


class WorkerFailed(Exception):
    """Why a worker cannot be used as it is."""


class Launch(Protocol):
    """How one kind of worker is started, and what it must say of itself. A running one whose `fingerprint` is equal is as
    good as a new one."""

    @property
    def served_name(self) -> str: ...  # the base's name at the engine

    @property
    def tells_port(self) -> bool: ...  # it chooses its port and writes ready.json; else it is told one

    def fingerprint(self) -> dict[str, Any]: ...

    def argv(self, folder: WorkerFolder, port: int) -> list[str]: ...

    def environment(self, key: str) -> Mapping[str, str]: ...  # over our own

    async def greet(self, control: EngineControl, timeout_s: float) -> dict[str, Any]:
        """What it says of itself, `kind` and `max_model_len` among it; WorkerFailed when it is not what was started."""
        ...


class WorkerFolder:
    """DATA/engines/NAME: its files, and the worker that they tell of."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.key = self.path / "key"
        self.spawn_record = self.path / "spawn.json"
        self.ready_file = self.path / READY_FILE
        self.log = self.path / "worker.log"
        self.python_mark = f"{PYTHON_MARK}={self.path}"  # a Python's -X that means nothing but tells whose it is

    def spawn(self, launch: Launch) -> ProcessHandle:
        """Starts a worker in a session of its own. OSError when that cannot be done."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ready_file.unlink(missing_ok=True)
        self.spawn_record.unlink(missing_ok=True)
        key = self._write_key()
        self._rotate_log()
        port = 0 if launch.tells_port else _free_port()
        with self.log.open("ab") as log_file:
            child = subprocess.Popen(
                launch.argv(self, port),
                env={**os.environ, **launch.environment(key)},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                # `-m` looks in the working directory first: it must be ours, not one with some other `gateway` in it.
                cwd=Path(gateway.__file__).parent.parent,
            )
        handle: ProcessHandle | None = None
        try:
            handle = ProcessHandle.of_child(child)
            write_json(self.spawn_record, self._record(handle.pid, handle.start_time, port, launch))
        except OSError:  # a full disk, no descriptor left: a worker that nobody would find again must not stay
            child.kill()
            child.wait()
            if handle is not None:
                handle.close()
            raise
        return handle

    def find_worker(self, launch: Launch) -> tuple[ProcessHandle | None, list[ProcessHandle]]:
        """The live worker that can be taken over, and those of ours that cannot and have to be ended."""
        adoptable: ProcessHandle | None = None
        leftovers: list[ProcessHandle] = []
        record = _read_object(self.spawn_record)
        recorded = _open_recorded(record)
        if recorded is not None:
            if record == self._record(recorded.pid, recorded.start_time, record.get("port", 0), launch):
                adoptable = recorded
            else:
                leftovers.append(recorded)
        # A gateway killed between the fork and spawn.json leaves a worker that only its command line tells of.
        for pid in _session_leaders():
            if (recorded is None or pid != recorded.pid) and _is_of_folder(pid, str(self.path)):
                handle = ProcessHandle.open(pid, process_start_time(pid) or -1)
                if handle is not None:
                    leftovers.append(handle)
        return adoptable, leftovers

    def port_of(self, handle: ProcessHandle, launch: Launch) -> int | None:
        """The port on which this very process answers, or will; None while it is not known."""
        ready = _read_object(self.ready_file if launch.tells_port else self.spawn_record)
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
        kept = [line.strip()[:LOG_LINE_CHARS] for line in text.splitlines() if line.strip()][-lines:]
        return "".join(c if c.isprintable() else "?" for c in " | ".join(kept))

    def end_orphans(self, handle: ProcessHandle) -> None:
        """Kills what a worker that is gone has left in its session: vLLM's engine is a process of its own.

        A session's number is not given away while anybody is in it, and the worker had led it.
        """
        for pid, session in _sessions():
            if session == handle.pid and pid != handle.pid and (process_start_time(pid) or 0) >= handle.start_time:
                log.info("%s: ends process %d, which the worker %d left", self.path.name, pid, handle.pid)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _record(self, pid: int, start_time: int, port: int, launch: Launch) -> dict[str, Any]:
        place = {"pid": pid, "start_time": start_time, "port": port, "folder": str(self.path)}
        return place | {"spec": {"tunegate": gateway.__version__} | launch.fingerprint()}

    def _write_key(self) -> str:
        self.key.unlink(missing_ok=True)
        fd = os.open(self.key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        key = secrets.token_urlsafe(32)
        with os.fdopen(fd, "w") as file:
            file.write(key)
        return key

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
    pid, start_time, folder = record.get("pid"), record.get("start_time"), record.get("folder")
    if type(pid) is not int or type(start_time) is not int or not isinstance(folder, str) or pid <= 1:
        return None
    handle = ProcessHandle.open(pid, start_time)
    if handle is not None and not _is_of_folder(pid, folder):
        handle.close()
        return None
    return handle


def _is_of_folder(pid: int, folder: str) -> bool:
    """Whether a command line names this folder in one of the ways that a `Launch` does."""
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False
    marks = {(b"--ready-file", os.fsencode(Path(folder, READY_FILE))), (b"-X", os.fsencode(f"{PYTHON_MARK}={folder}"))}
    return not marks.isdisjoint(itertools.pairwise(argv))


def _session_leaders() -> Iterator[int]:
    """Workers are spawned as such; a child that one forks is none, though it shows the same command line."""
    return (pid for pid, session in _sessions() if pid == session)


def _sessions() -> Iterator[tuple[int, int]]:
    """Every process and its session."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                yield int(entry.name), os.getsid(int(entry.name))
        except ProcessLookupError:
            continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        log.warning("%s is not readable and is taken as absent: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}
