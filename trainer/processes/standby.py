"""A trainer that is there before its job: libraries imported, the next base loaded, its errands given over a pipe.

    python -m trainer.processes.standby --threads N [--relaxed]

Place in the flow: gateway/jobs/standby.py → **standby** → the same `work` as `python -m trainer`. It is told on stdin, a
JSON object a line, and says on stdout, a line each:

                                → "ready", when all is imported, and again with each base that is loaded
    {"do": "load", "base": …, "relaxed": …}     has that base in memory, where memory allows
    {"do": "check", "job": …}   → "checked CODE", CODE as `python -m trainer JOB_DIR --check` exits with
    {"do": "train", "job": …}   → "taken", once the job's lock is held; exits as `python -m trainer JOB_DIR` does

What is relaxed is done only while nobody else wants the processors.

Its rule: it ends when its stdin does, unless it is at work; then it ends when that is done. What it makes is what a trainer
that was started for the job would make, bit for bit: the environment and the number of threads are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.jobdir import CHECK_RECORD, LOCKED_EXIT_CODE, BaseRef, JobDir
from trainer.__main__ import leave, work
from trainer.processes.libraries import import_libraries, set_environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARE_OF_MEMORY = 8  # a base that waits for a job takes no more of what is available


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.processes.standby")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--relaxed", action="store_true", help="import in a relaxed way")
    options = parser.parse_args()
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    set_environment(options.threads)
    warmth = Warmth(answers, options.relaxed)
    for line in sys.stdin.buffer:
        command = json.loads(line)
        if command["do"] == "load":
            warmth.load(BaseRef(**command["base"]), command["relaxed"])
            continue
        job = JobDir(command["job"])
        if command["do"] == "check":
            with _at(job):
                code = _check(job)
            (job.path / CHECK_RECORD).unlink(missing_ok=True)  # it said that this process is at work
            os.write(answers, f"checked {code}\n".encode())
            continue
        with _at(job):
            return _train(job, warmth, answers)
    return 0  # nobody is there any more; the other thread may be in the middle of an import, which `leave` does not wait for


def _check(job: JobDir) -> int:
    lock = job.try_lock()
    if lock is None:
        return LOCKED_EXIT_CODE
    try:
        return work(job, check_only=True)
    finally:
        os.close(lock)


def _train(job: JobDir, warmth: Warmth, answers: int) -> int:
    lock = job.try_lock()
    if lock is None:
        return LOCKED_EXIT_CODE
    os.write(answers, b"taken\n")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return work(job, warmth=warmth)


class Warmth:
    """What a trainer can do before it knows its job, on threads beside the one that waits for it."""

    def __init__(self, answers: int, relaxed: bool) -> None:
        """Begins with the imports; `relaxed` ones get only what the processors have left."""
        self._answers = answers
        self._loaded: tuple[BaseRef, PreTrainedModel] | None = None
        self._last = threading.Thread(target=self._import, args=(relaxed,), daemon=True)
        self._last.start()

    def load(self, base: BaseRef, relaxed: bool) -> None:
        """Begins to load a base when what was begun before is done."""
        self._last = threading.Thread(target=self._load, args=(base, relaxed, self._last), daemon=True)
        self._last.start()

    def wait(self) -> None:
        """Returns when all that was begun is done."""
        self._last.join()

    def take(self, base: BaseRef) -> PreTrainedModel | None:
        """The base, if it is the one that was loaded; nobody else gets it."""
        loaded, self._loaded = self._loaded, None
        return loaded[1] if loaded is not None and loaded[0] == base else None

    def _import(self, relaxed: bool) -> None:
        _relax(relaxed)
        import_libraries()
        self._say_ready()

    def _load(self, base: BaseRef, relaxed: bool, before: threading.Thread) -> None:
        before.join()
        _relax(relaxed)
        from trainer.model import load_base

        if self._loaded is not None and self._loaded[0] == base:
            return
        self._loaded = None
        try:
            if _float32_bytes(base) * _SHARE_OF_MEMORY <= _available_bytes():
                self._loaded = (base, load_base(base))
        except Exception:  # the job itself will find what is wrong, and say it
            traceback.print_exc()
        self._say_ready()

    def _say_ready(self) -> None:
        with contextlib.suppress(OSError):  # a job has begun meanwhile, or nobody is there
            os.write(self._answers, b"ready\n")


def _relax(relaxed: bool) -> None:
    """For the thread that calls: Linux has a policy for each, and there is no way back without a privilege."""
    if relaxed:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def _at(job: JobDir) -> Iterator[None]:
    """In the job's folder and writing to its log, as a process that was started for it."""
    kept = os.dup(1), os.dup(2)
    log = os.open(job.path / "trainer.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    home = Path.cwd()
    try:
        for number in (1, 2):
            os.dup2(log, number)
        os.chdir(job.path)
        yield
    finally:
        sys.stdout.flush()
        os.chdir(home)
        for number, fd in enumerate(kept, start=1):
            os.dup2(fd, number)
        for fd in (log, *kept):
            os.close(fd)


def _float32_bytes(base: BaseRef) -> int:
    """What a base takes in float32; weights in a Hugging Face folder have 16 bits at least."""
    folder = Path(base.path)
    if base.hf is not None:
        return sum(file.stat().st_size for file in (folder / base.hf).glob("*.safetensors")) * 2
    import gguf

    assert base.gguf is not None
    return sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(folder / base.gguf).tensors) * 4


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


if __name__ == "__main__":
    leave(main())
