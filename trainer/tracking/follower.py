"""`python -m trainer.tracking JOB_DIR KIND`: one tracker is told what the job's folder says, until the job is over.

Place in the flow: feed → **follower** → a run. A process of its own, started by `followers` or by hand. One rule: it owes the
job nothing and the job owes it nothing; whatever the tracker does, this process ends, and soon after the trainer does.

    stdin       "succeeded" or "failed" when the trainer is done. Its end alone means that the trainer was killed or paused,
                or, where there is a result.json, that the job is over: `… < /dev/null` tells such a job by hand
    stdout      one line of JSON for each thing that went wrong
    tracking/KIND.json      the last step that was told, and whether the run was ended with the job
    tracking/KIND.log       the tracebacks, without secrets
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import select
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from gateway.jobdir import JobDir, Tracker, TrackerKind, read_json, write_json
from trainer.tracking.feed import Feed
from trainer.tracking.run import Open, Run, Status, TrackedJob, describe
from trainer.tracking.secrets import Secrets

POLL_S = 0.5
RETRY_S = 30.0
LOCK_WAIT_S = 20.0  # the follower of an attempt that was killed may be at its end still
LAST_WORDS_S = 20  # what a follower may take behind the end of a trainer that was killed
_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Told:
    """How far a tracker has come, as it stands on the disk."""

    step: int = 0
    ended: bool = False  # it knows that the job succeeded, and has the adapter

    @classmethod
    def read(cls, job: JobDir, kind: str) -> Told:
        path = job.tracking / f"{kind}.json"
        return cls(**read_json(path)) if path.exists() else cls()

    def write(self, job: JobDir, kind: str) -> None:
        write_json(job.tracking / f"{kind}.json", asdict(self))


class Follower:
    """`follow()` tells one tracker everything, then returns the exit code."""

    def __init__(self, job: JobDir, tracker: Tracker, control: int, problems: int) -> None:
        """`control` is read, `problems` written: descriptors, as the module says of stdin and stdout."""
        self._job, self._tracker, self._control, self._problems = job, tracker, control, problems
        self._secrets = Secrets(os.environ)
        self._told = Told.read(job, tracker.kind)
        self._feed = Feed(job, self._told.step)
        self._run: Run | None = None
        self._failing = False
        self._word = b""

    def follow(self) -> int:
        """0 when the tracker knows everything, 1 when it does not."""
        if not self._lock():
            return 1
        ending = self._wait(0)
        while True:
            if ending == "interrupted":
                signal.alarm(LAST_WORDS_S)
            try:
                self._tell()
                if ending is not None:
                    self._end(ending)
                    return 0
                self._failing = False
            except Exception as error:  # the boundary to a library, and to a server
                self._fail(error)
                if ending is not None or isinstance(error, ImportError):
                    return 1
            ending = self._wait(RETRY_S if self._failing else POLL_S)

    def _lock(self) -> bool:
        """Whether this is the only follower; held until the process ends."""
        fd = os.open(self._job.tracking / f"{self._tracker.kind}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._told = Told.read(self._job, self._tracker.kind)
                self._feed = Feed(self._job, self._told.step)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(POLL_S)

    def _tell(self) -> None:
        if self._run is None:
            self._run = self._open()
        while points := self._feed.read():
            self._run.tell(points)
            self._told = Told(points[-1].step)
            self._told.write(self._job, self._tracker.kind)

    def _open(self) -> Run:
        spec, check = self._job.read_spec(), self._job.read_check()
        assert check is not None, "a trainer that tracks has a check"
        module = importlib.import_module(f"trainer.tracking.{self._tracker.kind}_run")
        return cast(Open, module.open_run)(
            TrackedJob(
                tracker=self._tracker,
                job_id=spec.job_id,
                name=self._tracker.name or spec.job_id,
                config=describe(spec, check),
                folder=self._job.tracking,
                told=self._told.step,
            )
        )

    def _end(self, status: Status) -> None:
        assert self._run is not None
        self._run.end(status, self._job.adapter if status == "succeeded" else None)
        if status == "succeeded":
            Told(self._told.step, ended=True).write(self._job, self._tracker.kind)

    def _fail(self, error: Exception) -> None:
        """Told once until it works again; then everything that was missed is told."""
        self._run, self._feed = None, Feed(self._job, self._told.step)
        with (self._job.tracking / f"{self._tracker.kind}.log").open("a") as log:
            log.write(self._secrets.hide(traceback.format_exc()))
        if not self._failing:
            self._failing = True
            # All of it first: half a secret would not be found.
            said = " ".join(self._secrets.hide(f"{type(error).__name__}: {error}").split())
            line = json.dumps({"problem": said[:_MESSAGE_CHARACTERS]}) + "\n"
            with contextlib.suppress(BrokenPipeError):
                os.write(self._problems, line.encode())

    def _wait(self, timeout_s: float) -> Status | None:
        """How the trainer ended; None while it is at work."""
        deadline = time.monotonic() + timeout_s
        while select.select([self._control], [], [], max(0.0, deadline - time.monotonic()))[0]:
            read = os.read(self._control, 64)
            if not read:
                word = self._word.decode().strip()
                if word in ("succeeded", "failed"):
                    return cast(Status, word)
                result = self._job.read_result()  # there is one when a job that is over is told by hand
                return "interrupted" if result is None else result.status
            self._word += read
        return None


def main(arguments: list[str]) -> int:
    """Follows the job as the command line says."""
    job, kind = JobDir(Path(arguments[0]).absolute()), arguments[1]
    tracker = {tracker.kind: tracker for tracker in job.read_spec().trackers}[cast(TrackerKind, kind)]
    job.tracking.mkdir(mode=0o700, exist_ok=True)
    problems = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):  # a library's words may hold a key: they go nowhere
        os.dup2(nowhere, stream)
    os.chdir(job.tracking)
    os.nice(5)  # training comes first
    # A tracker's own processes go with this one, however it ends.
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
    return Follower(job, tracker, 0, problems).follow()
