"""Starts trainers, and finds again those that an earlier gateway started.

Its one rule: a trainer outlives the gateway. It gets a session and a process group of its own, its log is a file, it inherits
no descriptor, and none of the gateway's secrets stand in its environment but the keys of the trackers that its job has. The
job's lock, not the launcher, makes sure that there is one.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import gateway
from gateway.engines.handle import ProcessHandle
from gateway.jobdir import CHECK_RECORD, BaseRef, JobDir, process_start_time, read_json, write_json
from gateway.jobs.priority import give_way
from gateway.jobs.standby import Standby
from gateway.jobs.torchrun import is_group
from gateway.jobs.tracking import tracker_environment
from gateway.tracking_settings import TrackingSettings

TRAINER_COMMAND = (sys.executable, "-m", "trainer")
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
KEPT_PREFIXES = ("LC_", "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "GLOO_", "NCCL_")


class CheckProcess(Protocol):
    """A check at work: a process of its own, or an errand of the standby."""

    exit_code: int | None

    async def wait(self, timeout_s: float) -> bool: ...

    async def end(self, grace_s: float) -> bool: ...

    def close(self) -> None: ...


class Launcher:
    """Runs `command JOB_DIR …`; another command stands in for the trainer where a test needs one that misbehaves."""

    def __init__(
        self,
        command: tuple[str, ...] = TRAINER_COMMAND,
        standby: Standby | None = None,
        tracking: TrackingSettings | None = None,
    ) -> None:
        self._command = command
        self._standby = standby
        self._tracking = tracking or TrackingSettings()

    async def train(self, folder: JobDir) -> ProcessHandle:
        """Starts a trainer, or gives the job to the one that stands by.

        It may find the lock taken and exit with LOCKED_EXIT_CODE.
        """
        if self._standby is not None:
            spec = await asyncio.to_thread(folder.read_spec)
            if not is_group(spec.launch):
                spare = await self._standby.train(folder, spec)
                if spare is not None:
                    return spare
        return await self._start(folder, ())

    async def check(self, folder: JobDir) -> CheckProcess:
        """Starts the check of a job's files."""
        if self._standby is not None and (pid := self._standby.pid) is not None and self._standby.ready:
            await asyncio.to_thread(_record_check, folder, pid)
            errand = self._standby.check(folder)
            if errand is not None:
                return errand
        return await self._start(folder, ("--check",))

    async def expect(self, base: BaseRef | None) -> None:
        """A job is near, on this base if that is known."""
        if self._standby is not None:
            await self._standby.expect(base)

    async def foresee(self, base: BaseRef | None) -> None:
        """A job may come."""
        if self._standby is not None:
            await self._standby.foresee(base)

    async def rest(self, base: BaseRef | None) -> None:
        """No job is at work; the next one may be on this base."""
        if self._standby is not None:
            await self._standby.rest(base)

    async def close(self) -> None:
        """Lets go of every trainer and check that is at work, and ends the one that stands by."""
        if self._standby is not None:
            await self._standby.close()

    async def _start(self, folder: JobDir, arguments: tuple[str, ...]) -> ProcessHandle:
        spawning = asyncio.ensure_future(asyncio.to_thread(self._spawn, folder, arguments))
        try:
            handle = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            (await spawning).close()
            raise
        handle.watch()
        return handle

    def _spawn(self, folder: JobDir, arguments: tuple[str, ...]) -> ProcessHandle:
        environment = child_environment(os.environ)
        if not arguments:
            environment |= tracker_environment(folder.read_spec().trackers, self._tracking, os.environ)
        with (folder.path / "trainer.log").open("ab") as log:
            child = subprocess.Popen(
                [*self._command, str(folder.path), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder.path,
                env=environment,
                start_new_session=True,
            )
        give_way(child.pid)
        handle = ProcessHandle.of_child(child)
        if arguments:
            _record_check(folder, handle.pid)
        return handle


async def adopt_trainer(folder: JobDir) -> ProcessHandle | None:
    """The process that holds the job's lock; None when nobody does, or nobody that can be told from a stranger."""
    return _watched(await asyncio.to_thread(_open_holder, folder))


async def adopt_check(folder: JobDir) -> ProcessHandle | None:
    """A check that an earlier gateway left running."""
    return _watched(await asyncio.to_thread(_open_check, folder))


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a trainer may know of the gateway's environment: no keys, and where our packages are."""
    kept = {k: v for k, v in environ.items() if k in KEPT_VARIABLES or k.startswith(KEPT_PREFIXES)}
    # The working directory is the job's: nothing in it may be taken for a module.
    kept["PYTHONSAFEPATH"] = "1"
    kept["PYTHONUNBUFFERED"] = "1"
    root = Path(gateway.__file__).resolve().parent.parent
    if root.name not in ("site-packages", "dist-packages"):
        kept["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environ.get("PYTHONPATH")])])
    return kept


def _record_check(folder: JobDir, pid: int) -> None:
    write_json(folder.path / CHECK_RECORD, {"pid": pid, "start_time": process_start_time(pid) or 0})


def _open_holder(folder: JobDir) -> ProcessHandle | None:
    holder = folder.holder()
    return None if holder is None else ProcessHandle.open(holder.pid, holder.start_time)


def _open_check(folder: JobDir) -> ProcessHandle | None:
    try:
        record = read_json(folder.path / CHECK_RECORD)
        return ProcessHandle.open(int(record["pid"]), int(record["start_time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _watched(handle: ProcessHandle | None) -> ProcessHandle | None:
    if handle is not None:
        handle.watch()
    return handle
