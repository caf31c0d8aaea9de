"""`python -m trainer.processes.rank JOB_DIR`: one of the processes that train a job together, as `group` starts them.

Place in the flow: group → torchrun's agent → **rank** → the same `run` as a trainer on its own. One rule: it never outlives
the group. The kernel ends it when the process that started it is gone, and while it lives it holds the job's `ranks.lock`
with the others, which the next group waits for. Why it failed is in `ranks/RANK.json`, for `group` to find out who was first.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from gateway.jobdir import JobDir
from trainer.__main__ import run
from trainer.processes.group import LEADER_VARIABLE, Failure, LostRanks, ranks_lock

_PR_SET_PDEATHSIG = 1


def main() -> int:
    job = JobDir(Path(sys.argv[1]))
    end_with(int(os.environ[LEADER_VARIABLE]))
    alive = os.open(ranks_lock(job), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # open for this process's whole life
    fcntl.flock(alive, fcntl.LOCK_SH)
    rank = int(os.environ["RANK"])
    try:
        result = run(job, rank=rank)
    except OSError as error:
        traceback.print_exc()
        _fail(job, rank, Failure(time.time(), isinstance(error, LostRanks), f"{type(error).__name__}: {error}", None))
    else:
        if result is not None and result.error is not None:
            _fail(job, rank, Failure(time.time(), False, result.error.message, result.error))
    return 0


def end_with(leader: int) -> None:
    """This process is killed when the one that started it is gone, however that came."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:  # it was gone before
        os._exit(1)


def _fail(job: JobDir, rank: int, failure: Failure) -> None:
    failure.write(job, rank)
    sys.stderr.flush()
    os._exit(1)  # what torch does at the end of a process may wait for the other ranks


if __name__ == "__main__":
    sys.exit(main())
