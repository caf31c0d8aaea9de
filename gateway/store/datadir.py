"""The data folder: its layout, and the lock by which one gateway at a time owns it.

    lock            flocked by the gateway for its whole life; holds its pid as JSON
    tunegate.db     the store (with its -wal and -shm files)
    keys.stamp      grows by a byte whenever a key is made or revoked: `gateway/keys.py`
    blobs/          files by digest: `blobs.py`
    bases/NAME/     prepared bases
    jobs/ID/        job directories: `gateway/jobdir/`
    adapters/DIGEST/    published adapters, never changed
    exports/ID/     what is being made of a tuned model for a client: `gateway/exports.py`
    tracking/       what trackers keep here: TensorBoard's files, MLflow's database and artifacts
    imports/ID/     adapters from elsewhere that the gateway has not taken up: `gateway/jobs/imports.py`
    engines/NAME/   what is needed to find a running worker again: key, ready.json, worker.log

The kernel drops the lock with the process, however it dies; the file itself stays.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from gateway.errors import SettingsError

FOLDERS = ("blobs", "blobs/tmp", "bases", "jobs", "adapters", "engines")


class DataDir:
    """A locked data folder; `close` gives it free."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.database = path / "tunegate.db"
        self.keys_stamp = path / "keys.stamp"
        self.blobs = path / "blobs"
        self.bases = path / "bases"
        self.jobs = path / "jobs"
        self.adapters = path / "adapters"
        self.engines = path / "engines"
        self.tracking = path / "tracking"
        self._lock_fd: int | None = lock_fd

    @classmethod
    def open(cls, path: Path) -> DataDir:
        """The folder, made where it was missing, held by this process. Raises `SettingsError`."""
        path = path.expanduser().absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock_fd = _lock(path)
        except OSError as error:
            raise SettingsError(
                f"The data folder {path} cannot be used: {error.strerror}. It must be a folder that this user may write "
                "to; another one is set with --data."
            ) from error
        try:
            for folder in FOLDERS:
                (path / folder).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            os.close(lock_fd)
            raise SettingsError(
                f"The data folder {path} cannot be used: {error.filename}: {error.strerror}."
            ) from error
        return cls(path, lock_fd)

    def close(self) -> None:
        """Releases the lock. May be called twice."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None


def _lock(path: Path) -> int:
    """A descriptor that holds the lock until it is closed; no child inherits it."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read_holder(fd)
        os.close(fd)
        raise SettingsError(
            f"The data folder {path} is in use by another Tunegate ({holder}). Stop that one, or give this one a folder "
            "of its own with --data."
        ) from None
    except BaseException:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": os.getpid()}).encode(), 0)
    return fd


def _read_holder(fd: int) -> str:
    try:
        return f"process {int(json.loads(os.pread(fd, 200, 0))['pid'])}"
    except (ValueError, KeyError, TypeError):
        return "a process that has only just started"
