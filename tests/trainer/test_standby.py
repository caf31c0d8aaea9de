"""The trainer that stands by, as a process: what it says, what it makes, and when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gateway.jobdir import LOCKED_EXIT_CODE, BaseRef, JobDir
from tests.trainer.conftest import folder_bytes, new_job


class StandingBy:
    """A standby as the gateway starts it."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "trainer.processes.standby", "--threads", "1", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._unread = b""

    def tell(self, **command: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, timeout_s: float = 120) -> str:
        """Its next line; empty at its end."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            assert select.select([self.process.stdout], [], [], deadline - time.monotonic())[0], "it says nothing"
            said = os.read(self.process.stdout.fileno(), 4096)
            if not said:
                return ""
            self._unread += said
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()


@pytest.fixture
def stand_by() -> Iterator[Callable[..., StandingBy]]:
    started: list[StandingBy] = []

    def start(*arguments: str) -> StandingBy:
        started.append(StandingBy(*arguments))
        return started[-1]

    yield start
    for standing in started:
        standing.process.kill()
        standing.process.wait()
        for pipe in (standing.process.stdin, standing.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def base_of(job: JobDir) -> dict[str, object]:
    return asdict(job.read_spec().base)


def test_it_checks_and_trains_to_the_same_bytes_as_a_trainer_started_for_the_job(
    finished_job: JobDir, tiny_base: Path, files: Path, tmp_path: Path, stand_by: Callable[..., StandingBy]
) -> None:
    job = new_job(tmp_path / "job", tiny_base, files)
    standing = stand_by("--relaxed")
    assert standing.hear() == "ready"
    standing.tell(do="load", base=base_of(job), relaxed=True)
    assert standing.hear() == "ready"
    standing.tell(do="check", job=str(job.path))
    assert standing.hear() == "checked 0"
    assert job.read_check() == finished_job.read_check()
    assert not job.is_locked()
    standing.tell(do="train", job=str(job.path))
    assert standing.hear() == "taken"
    holder = job.holder()
    assert holder is not None and holder.pid == standing.process.pid
    assert standing.process.wait(timeout=240) == 0
    assert job.read_result() == finished_job.read_result()
    assert folder_bytes(job.adapter) == folder_bytes(finished_job.adapter)


def test_it_trains_to_the_end_with_its_pipe_closed_on_the_base_that_the_job_names(
    finished_job: JobDir, tiny_base: Path, files: Path, tmp_path: Path, stand_by: Callable[..., StandingBy]
) -> None:
    """Told at once, as where a job comes before the imports are done; and the bases that were asked for are not the job's."""
    job = new_job(tmp_path / "job", tiny_base, files)
    other = replace(job.read_spec().base, digest="sha256:" + "0" * 64)
    standing = stand_by()
    standing.tell(do="load", base=asdict(other), relaxed=False)
    standing.tell(
        do="load", base=asdict(BaseRef("gone", str(tmp_path / "gone"), "gone.gguf", "sha256:0")), relaxed=False
    )
    standing.tell(do="load", base=asdict(other), relaxed=False)
    standing.tell(do="train", job=str(job.path))
    assert standing.process.stdin is not None
    standing.process.stdin.close()
    assert standing.hear() == "taken"
    assert standing.process.wait(timeout=240) == 0
    assert folder_bytes(job.adapter) == folder_bytes(finished_job.adapter)


def test_it_ends_with_its_pipe_even_while_it_imports(stand_by: Callable[..., StandingBy]) -> None:
    standing = stand_by()
    assert standing.process.stdin is not None
    standing.process.stdin.close()
    assert standing.hear() == ""
    assert standing.process.wait(timeout=30) == 0


def test_a_job_that_another_trainer_has_is_left_to_it(
    tiny_base: Path, files: Path, tmp_path: Path, stand_by: Callable[..., StandingBy]
) -> None:
    job = new_job(tmp_path / "job", tiny_base, files)
    lock = job.try_lock()
    assert lock is not None
    standing = stand_by()
    standing.tell(do="check", job=str(job.path))
    assert standing.hear(timeout_s=30) == f"checked {LOCKED_EXIT_CODE}"
    standing.tell(do="train", job=str(job.path))
    assert standing.process.wait(timeout=60) == LOCKED_EXIT_CODE
    os.close(lock)
    assert job.read_check() is None and job.read_result() is None
