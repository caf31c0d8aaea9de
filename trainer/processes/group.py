"""A job that several processes train together: they are started, watched and ended as one, by the process that has the lock.

Place in the flow: `python -m trainer JOB_DIR`, whose job.json has `launch.processes` > 1 → **group** → one
`trainer.processes.rank` a process. This process is the agent of `torchrun --standalone --nproc-per-node N`, in torchrun's own
code. One rule: whoever is gone takes the others along. A rank that ends early: the agent ends the rest. The agent itself:
the kernel kills the ranks.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from gateway.jobdir import JobDir, JobSpec, TrainerError, read_json, write_json

LEADER_VARIABLE = "TUNEGATE_TRAINER_PID"  # the process that started this one
PREVIOUS_RANKS_WAIT_S = 30.0
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"


class RankFailed(Exception):
    """One of the processes found what fails the job."""

    def __init__(self, error: TrainerError) -> None:
        super().__init__(error.message)
        self.error = error


class LostRanks(ConnectionError):
    """Another process was gone: what this one fails with follows from that."""


@dataclass(frozen=True)
class Failure:
    """Why a rank ended. `error` is None where trying again may help."""

    at: float
    lost: bool  # the others, see LostRanks
    said: str
    error: TrainerError | None

    def write(self, job: JobDir, rank: int) -> None:
        write_json(_record(job, rank), asdict(self))

    @classmethod
    def read(cls, job: JobDir, rank: int) -> Self | None:
        path = _record(job, rank)
        if not path.exists():
            return None
        raw = read_json(path)
        return cls(**{**raw, "error": TrainerError(**raw["error"]) if raw["error"] else None})


def train_together(job: JobDir, spec: JobSpec) -> None:
    """Returns when every rank is done. Raises RankFailed, or OSError where trying again may help."""
    world = spec.launch.processes
    if spec.launch.sharding in ("zero2", "zero3") and find_spec("deepspeed") is None:
        message = f"The sharding '{spec.launch.sharding}' needs DeepSpeed: pip install 'tunegate[deepspeed]'"
        raise RankFailed(TrainerError("deepspeed_missing", message))
    _wait_for_previous(job)
    records = _record(job, 0).parent
    shutil.rmtree(records, ignore_errors=True)
    records.mkdir()
    os.environ |= {
        LEADER_VARIABLE: str(os.getpid()),
        "OMP_NUM_THREADS": str(threads_of_rank(spec)),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # the ranks are all on this machine
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=spec.job_id,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,  # the gateway starts the group again, and counts
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(records)),
        signals_to_handle=_SIGNALS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "trainer.processes.rank", str(job.path))
    except ChildFailedError as error:
        found = {rank: Failure.read(job, rank) for rank in range(world)}
        raise first_failure(found, {rank: failed.exitcode for rank, failed in error.failures.items()}) from None
    except SignalException as received:
        signal.signal(received.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), received.sigval)  # ends as a process that has no group would


def threads_of_rank(spec: JobSpec) -> int:
    """The job's threads, shared out."""
    return max(1, spec.threads // spec.launch.processes)


def ranks_lock(job: JobDir) -> Path:
    """Flocked, shared, by every rank for its whole life."""
    return job.path / "ranks.lock"


def is_lost(error: Exception) -> bool:
    """Whether what failed is the talk with the other ranks: gloo's and NCCL's errors have no type of their own."""
    return type(error).__name__.startswith("Dist") or any(name in str(error) for name in ("gloo", "NCCL"))


def _record(job: JobDir, rank: int) -> Path:
    return job.path / "ranks" / f"{rank}.json"


def _wait_for_previous(job: JobDir) -> None:
    """Until no rank of an earlier group is alive: the kernel kills them an instant after the lock is free."""
    fd = os.open(ranks_lock(job), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + PREVIOUS_RANKS_WAIT_S
        while True:
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise OSError(f"processes of an earlier trainer are still at work in {job.path}") from error
                time.sleep(0.05)
    finally:
        os.close(fd)


def first_failure(found: dict[int, Failure | None], codes: dict[int, int]) -> Exception:
    """What ended the group: the first failure of a rank's own, else one that was killed, else a lost connection.

    `codes` are the exit codes of those that ended; a signal's number is negative. OSError where trying again may help.
    """
    world = len(found)
    told = sorted(((rank, failure) for rank, failure in found.items() if failure), key=lambda item: item[1].at)
    for rank, failure in told:
        if failure.error is not None:
            return RankFailed(replace(failure.error, message=f"{failure.error.message} (process {rank} of {world})"))
        if not failure.lost:
            return OSError(f"{failure.said} (process {rank} of {world})")
    for rank, code in sorted(codes.items()):
        if code < 0 and code != -signal.SIGTERM:  # which is how the agent ends the others
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                how += " (by the system, it may be, for want of memory)"
            return OSError(f"Process {rank} of {world} {how}")
    for rank, failure in told:
        return OSError(f"Process {rank} of {world} lost the others: {failure.said}")
    rank, code = min(codes.items())
    return OSError(f"Process {rank} of {world} exited with code {code}")
