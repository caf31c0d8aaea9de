"""The trackers' processes, as the trainer sees them: started before it trains, looked at between steps, ended after it.

Place in the flow: the trainer → **followers** → one `follower` each. One rule: nothing here waits, but for a bounded time
at the very end. `Tracking` is all that the training loop knows of trackers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gateway.jobdir import TRACKER_SECRETS, JobDir, JobSpec, Tracker
from trainer.events import EventLog
from trainer.stopping import Paused
from trainer.tracking.follower import Told

if TYPE_CHECKING:
    from trainer.tracking.samples import Samples  # imports torch, which is not set up yet when this is imported

END_WAIT_S = 60.0  # for the adapter's upload
_MESSAGE_CHARACTERS = 300
TITLES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "mlflow": "MLflow"}


def owed(job: JobDir, spec: JobSpec) -> bool:
    """Whether a tracker has not been told everything about this job."""
    return not all(Told.read(job, tracker.kind).ended for tracker in spec.trackers)


class Tracking:
    """What an attempt tells its trackers, and what they say when they fail.

    With no trackers all of it does nothing. As a context it ends them: as failed when an error leaves it that fails the
    job, as interrupted when another attempt will follow.
    """

    def __init__(
        self, job: JobDir, trackers: Sequence[Tracker], events: EventLog, end_wait_s: float = END_WAIT_S
    ) -> None:
        self._job, self._trackers, self._events, self._end_wait_s = job, trackers, events, end_wait_s
        self._samples: Samples | None = None
        self._children: list[_Child] = []

    def __enter__(self) -> Self:
        secrets = {name: os.environ.pop(name, None) for names in TRACKER_SECRETS.values() for name in names}
        if self._trackers:
            self._job.tracking.mkdir(mode=0o700, exist_ok=True)
        for tracker in self._trackers:
            if Told.read(self._job, tracker.kind).ended:
                continue
            own = {name: value for name in TRACKER_SECRETS[tracker.kind] if (value := secrets[name])}
            try:
                self._children.append(_Child(self._job, tracker, {**os.environ, **own}))
            except OSError as error:
                self._warn(tracker, f"its process could not be started: {error}")
        return self

    def sample_with(self, samples: Samples) -> None:
        """From now on each evaluation has `samples` write predictions."""
        self._samples = samples

    def on_evaluation(self, step: int) -> None:
        """The whole validation file was just measured; called before the metrics of the step are told."""
        if self._samples is None:
            return
        try:
            self._samples.write(step)
        except Exception as error:  # a model that can be trained may still be none that transformers can have answer
            self._samples = None
            said = f"The model gave no sample predictions; training is not affected: {type(error).__name__}: {error}"
            self._events.write("message", said[:_MESSAGE_CHARACTERS], level="warn")

    def on_metrics(self) -> None:
        """A step was told in the events, which the followers read; what went wrong with them is told here."""
        for child in self._children:
            for problem in child.read_problems(0.0):
                self._warn(child.tracker, problem)

    def on_end(self, status: str) -> None:
        """The adapter is written, or never will be: the trackers are told the rest, and waited for, for a bounded time."""
        deadline = time.monotonic() + self._end_wait_s
        for child in self._children:
            child.say(status)
        for child in self._children:
            for problem in child.read_problems(max(0.0, deadline - time.monotonic()), to_the_end=True):
                self._warn(child.tracker, problem)
            if child.is_alive():
                self._warn(
                    child.tracker, f"it did not take everything within {self._end_wait_s:g} s after the last step"
                )
            elif child.exit_code and not child.has_complained:
                self._warn(child.tracker, f"its process ended with exit code {child.exit_code}, without a word")
            child.kill()
        self._children.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError | Paused):
            self.on_end("failed")
        for child in self._children:  # the job goes on later: they end by themselves
            child.let_go()
        self._children.clear()

    def _warn(self, tracker: Tracker, problem: str) -> None:
        title = TITLES[tracker.kind]
        self._events.write("message", f"{title} could not be told; training is not affected: {problem}", level="warn")


class _Child:
    """One follower's process."""

    def __init__(self, job: JobDir, tracker: Tracker, environ: dict[str, str]) -> None:
        self.tracker = tracker
        self.has_complained = False
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.tracking", str(job.path), tracker.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environ,
            start_new_session=True,  # whoever ends the trainer's group leaves it its last words
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def read_problems(self, timeout_s: float, to_the_end: bool = False) -> list[str]:
        """What the follower has said by now; `to_the_end`, until it closes its output or the time is up."""
        deadline = time.monotonic() + timeout_s
        fd = self._stdout.fileno()
        while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            read = os.read(fd, 4096)
            self._rest += read
            if not read or not to_the_end:
                break
        *lines, self._rest = self._rest.split(b"\n")
        self.has_complained |= bool(lines)
        return [str(json.loads(line)["problem"]) for line in lines]

    def say(self, status: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(status.encode())
            self._stdin.close()

    def is_alive(self) -> bool:
        try:
            self._process.wait(1.0)  # its output is closed a moment before it is gone
        except subprocess.TimeoutExpired:
            return True
        return False

    @property
    def exit_code(self) -> int | None:
        """None while it is alive; that of a signal is negative."""
        return self._process.returncode

    def kill(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.let_go()

    def let_go(self) -> None:
        """Lets it end by itself: its input ends here."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._process.returncode = self._process.poll() or 0  # released on purpose
